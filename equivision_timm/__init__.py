"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models.

It also registers the data set `torch/rotated_folder` for timm's scripts.
"""

from equivision_timm.starting import end_on_ctrl_c

end_on_ctrl_c()  # first: the imports below take seconds

from equivision_timm.cli.tune import tune  # noqa: E402
from equivision_timm.escnn_interop import to_geometric_tensor  # noqa: E402
from equivision_timm.groups import Group  # noqa: E402
from equivision_timm.images import rotation as _rotation  # noqa: E402, F401
from equivision_timm.layers import ConvNormAct, FieldNorm, GroupPool, SteerableConv2d  # noqa: E402
from equivision_timm.models import (  # noqa: E402
    EquivariantBackbone,
    EquivariantFPN,
    EquivariantResNet,
    fuse_blocks,
    model_names,
)
from equivision_timm.testing import assert_equivariant, equivariance_error  # noqa: E402

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
    "fuse_blocks",
    "model_names",
    "to_geometric_tensor",
    "tune",
]
__version__ = "0.2.0"
