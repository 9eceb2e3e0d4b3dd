"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models.

It also registers the data sets `torch/rotated_folder` and `torch/oriented_folder` for timm's scripts.
"""

from equivision_timm import rotation as _rotation  # noqa: F401
from equivision_timm.escnn_interop import to_geometric_tensor
from equivision_timm.groups import Group
from equivision_timm.layers import ConvNormAct, FieldNorm, GroupPool, SteerableConv2d
from equivision_timm.models import (
    EquivariantBackbone,
    EquivariantFPN,
    EquivariantResNet,
    fuse,
    model_names,
)
from equivision_timm.models.tune import tune
from equivision_timm.testing import assert_equivariant, equivariance_error

__all__ = [
    "ConvNormAct",
    "EquivariantBackbone",
    "EquivariantFPN",
    "EquivariantResNet",
    "FieldNorm",
    "Group",
    "GroupPool",
    "SteerableConv2d",
    "assert_equivariant",
    "equivariance_error",
    "fuse",
    "model_names",
    "to_geometric_tensor",
    "tune",
]
__version__ = "0.2.0"
