"""The bridge to escnn, and the only file that imports it: samples its kernel bases, wraps maps for its layers.

Needs the extra: `pip install 'equivision-timm[escnn]'` (a Fortran compiler, numpy < 2). Nothing here runs when a
model is built or used.
"""

from typing import TYPE_CHECKING, Any

import torch

from equivision_timm.groups import Group
from equivision_timm.kernel_bases.kernel import Kernel

if TYPE_CHECKING:
    from escnn.gspaces import GSpace2D  # pyright: ignore[reportMissingImports]  an extra
    from escnn.nn import FieldType, GeometricTensor  # pyright: ignore[reportMissingImports]  an extra

__all__ = ["field_type", "gspace", "import_escnn", "sample_kernels", "to_geometric_tensor"]


def import_escnn() -> Any:
    """The package escnn.

    Raises:
        ImportError: the extra is not installed.
    """
    try:
        import escnn  # pyright: ignore[reportMissingImports]  an extra
        import escnn.gspaces  # pyright: ignore[reportMissingImports]  an extra
        import escnn.nn  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise ImportError(
            f"this needs escnn, which cannot be imported ({error}): pip install 'equivision-timm[escnn]' "
            "(it builds with gfortran and needs numpy < 2)"
        ) from error
    return escnn


def gspace(group: str) -> "GSpace2D":
    """escnn's space for a group of ours, with the same elements in the same order.

    Raises:
        ValueError: not a group name. ImportError: the extra is not installed.
    """
    spaces = import_escnn().gspaces
    parsed = Group.from_name(group)
    if not parsed.reflections:
        return spaces.rot2dOnR2(N=parsed.rotations) if parsed.rotations > 1 else spaces.trivialOnR2()
    return spaces.flipRot2dOnR2(N=parsed.rotations) if parsed.rotations > 1 else spaces.flip2dOnR2()


def field_type(group: str, fields: int) -> "FieldType":
    """The escnn type of `fields` regular fields."""
    space = gspace(group)
    return import_escnn().nn.FieldType(space, fields * [space.regular_repr])


def to_geometric_tensor(features: torch.Tensor, group: str) -> "GeometricTensor":
    """An equivariant map of our models, [B, fields * |G|, H, W], as an escnn `GeometricTensor` (no copy).

    Raises:
        ValueError: the channels are not whole fields of the group. ImportError: the extra is not installed.
    """
    order = Group.from_name(group).order
    if features.ndim != 4 or features.shape[1] % order:
        raise ValueError(
            f"a map of shape {tuple(features.shape)} does not consist of regular fields of {group}: "
            f"expected [B, fields * {order}, H, W]"
        )
    return import_escnn().nn.GeometricTensor(features, field_type(group, features.shape[1] // order))


def sample_kernels(kernel: Kernel) -> dict[str, Any]:
    """escnn's own basis of the kernels from one field to one regular field.

    Returns:
        kernels: [n_basis, |G|, H, k, k] float32. he_std: [n_basis] float32. elements: for each basis element, its
        harmonic J, ring radius, angular frequency, input and output irrep. rings: for each ring its radius, sigma
        and largest frequency.

    Raises:
        ValueError: the kernels have a low pass, which escnn does not know. ImportError: the extra is not installed.
    """
    if kernel.low_pass:
        raise ValueError(f"escnn has no kernels with a low pass, as {kernel.name}: use low_pass=False")
    escnn = import_escnn()
    space = gspace(kernel.group)
    in_repr = space.trivial_repr if kernel.input_type == "trivial" else space.regular_repr
    in_type, out_type = escnn.nn.FieldType(space, [in_repr]), field_type(kernel.group, 1)
    cutoff = None if kernel.cutoff is None else float(kernel.cutoff)
    conv = escnn.nn.R2Conv(in_type, out_type, kernel.size, frequencies_cutoff=cutoff, bias=False, initialize=False)
    kernels = torch.stack([conv.basisexpansion(row) for row in torch.eye(conv.weights.numel())])
    he_std = escnn.nn.init._generalized_he_init_variances(conv.basisexpansion)  # the roots, despite the name
    info = list(conv.basisexpansion.get_basis_info())
    elements = [
        {
            "J": str(attribute["j"]),
            "radius": float(attribute["radius"]),
            "frequency": int(attribute["irrep:frequency"]),
            "in_irrep": str(attribute["in_irrep"]),
            "out_irrep": str(attribute["out_irrep"]),
        }
        for attribute in info
    ]
    rings = [
        {
            "radius": float(radius),
            "sigma": float(sigma),
            "max_frequency": max(element["frequency"] for element in elements if element["radius"] == float(radius)),
        }
        for radius, sigma in zip(conv._rings, conv._sigma, strict=True)
    ]
    shape = (len(info), out_type.size, in_type.size, kernel.size, kernel.size)
    return {"kernels": kernels.detach().view(shape), "he_std": he_std, "elements": elements, "rings": rings}
