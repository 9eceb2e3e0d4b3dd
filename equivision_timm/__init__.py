"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models.

It also registers the data set `torch/rotated_folder` for timm's scripts.
"""

from equivision_timm.groups import Group
from equivision_timm.images import rotation as _rotation  # noqa: F401  registers the data set
from equivision_timm.kernel_bases.from_escnn import to_geometric_tensor
from equivision_timm.layers import ConvNormAct, FieldNorm, GroupPool, SteerableConv2d
from equivision_timm.models import EquivariantBackbone, EquivariantResNet, model_names
from equivision_timm.testing import assert_equivariant, equivariance_error

__all__ = [
    "ConvNormAct",
    "EquivariantBackbone",
    "EquivariantResNet",
    "FieldNorm",
    "Group",
    "GroupPool",
    "SteerableConv2d",
    "assert_equivariant",
    "equivariance_error",
    "model_names",
    "to_geometric_tensor",
]
__version__ = "0.2.0"
