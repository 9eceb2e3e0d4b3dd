"""Bases of equivariant kernels: of any group and size in closed form, in the coordinates of published weights where
there are some. `basis.py` has the maths and the loader, `irreps_basis.py` the block-diagonal form."""

from equivision_timm.kernel_bases.basis import (
    KernelBasis,
    are_bases,
    bases_sha256,
    initial_std,
    load_kernel_basis,
    sample_kernels,
)
from equivision_timm.kernel_bases.irreps_basis import IrrepsBasis, block_coefficients, load_irreps_basis
from equivision_timm.kernel_bases.kernel import Kernel, Ring
from equivision_timm.kernel_bases.tables import manifest, table_key

__all__ = [
    "IrrepsBasis",
    "Kernel",
    "KernelBasis",
    "Ring",
    "are_bases",
    "bases_sha256",
    "block_coefficients",
    "initial_std",
    "load_irreps_basis",
    "load_kernel_basis",
    "manifest",
    "sample_kernels",
    "table_key",
]
