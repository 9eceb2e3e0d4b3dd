"""timm models; importing this package registers them."""

from equivision_timm.models.backbone import EquivariantBackbone
from equivision_timm.models.equivariant_fpn import EquivariantFPN
from equivision_timm.models.equivariant_resnet import EquivariantResNet
from equivision_timm.models.equivariant_vit import EquivariantViT
from equivision_timm.models.fuse_blocks import fuse_blocks
from equivision_timm.models.variants import family_of, is_ours, model_names

__all__ = [
    "EquivariantBackbone",
    "EquivariantFPN",
    "EquivariantResNet",
    "EquivariantViT",
    "family_of",
    "fuse_blocks",
    "is_ours",
    "model_names",
]
