"""Interoperability with escnn; the only file that imports it.

Needs the extra `escnn` (a Fortran compiler, numpy < 2). Nothing here runs when a model is built or used.
"""

from typing import TYPE_CHECKING, Any

import torch

from equivision_timm.errors import install_command
from equivision_timm.groups import Group

if TYPE_CHECKING:
    from escnn.gspaces import GSpace2D  # pyright: ignore[reportMissingImports]  an extra
    from escnn.nn import FieldType, GeometricTensor  # pyright: ignore[reportMissingImports]  an extra

__all__ = ["field_type", "gspace", "import_escnn", "to_geometric_tensor"]


def import_escnn() -> Any:
    """The package escnn, with `gspaces` and `nn`; ImportError if the extra is not installed."""
    try:
        import escnn.gspaces  # pyright: ignore[reportMissingImports]  an extra
        import escnn.nn  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise ImportError(
            f"escnn cannot be imported ({error}): {install_command('escnn')} (needs gfortran and numpy < 2)"
        ) from error
    return escnn


def gspace(group: str) -> "GSpace2D":
    """The space of escnn for a group, with the same elements in the same order."""
    spaces, parsed = import_escnn().gspaces, Group.from_name(group)
    if parsed.reflections:
        return spaces.flipRot2dOnR2(N=parsed.rotations) if parsed.rotations > 1 else spaces.flip2dOnR2()
    return spaces.rot2dOnR2(N=parsed.rotations) if parsed.rotations > 1 else spaces.trivialOnR2()


def field_type(group: str, fields: int) -> "FieldType":
    """The escnn type of `fields` regular fields."""
    space = gspace(group)
    return import_escnn().nn.FieldType(space, fields * [space.regular_repr])


def to_geometric_tensor(features: torch.Tensor, group: str) -> "GeometricTensor":
    """Equivariant features [B, fields * |G|, H, W] as an escnn `GeometricTensor` (no copy)."""
    fields = features.shape[1] // Group.from_name(group).order
    return import_escnn().nn.GeometricTensor(features, field_type(group, fields))
