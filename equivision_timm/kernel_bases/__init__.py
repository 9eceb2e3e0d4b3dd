"""Frozen kernel bases: see `basis.py` for the maths and the loader, `from_escnn.py` for where they come from."""

from equivision_timm.kernel_bases.basis import KernelBasis, initial_std, load_kernel_basis, manifest, sample_kernels
from equivision_timm.kernel_bases.irreps_basis import IrrepsBasis, block_coefficients, block_products, load_irreps_basis

__all__ = [
    "IrrepsBasis",
    "KernelBasis",
    "block_coefficients",
    "block_products",
    "initial_std",
    "load_irreps_basis",
    "load_kernel_basis",
    "manifest",
    "sample_kernels",
]
