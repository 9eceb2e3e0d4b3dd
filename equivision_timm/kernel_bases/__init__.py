"""Frozen kernel bases: see `basis.py` for the maths and the loader, `from_escnn.py` for where they come from."""

from equivision_timm.kernel_bases.basis import KernelBasis, load_kernel_basis, manifest

__all__ = ["KernelBasis", "load_kernel_basis", "manifest"]
