"""Frozen kernel bases: see `basis.py` for the maths and the loader, `from_escnn.py` for where they come from."""

from equivision_timm.kernel_bases.basis import KernelBasis, load_kernel_basis, manifest
from equivision_timm.kernel_bases.irreps_basis import IrrepsBasis, load_irreps_basis

__all__ = ["IrrepsBasis", "KernelBasis", "load_irreps_basis", "load_kernel_basis", "manifest"]
