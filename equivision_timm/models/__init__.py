"""timm models; importing this package registers them."""

from equivision_timm.models import adapted_names as _adapted_names  # noqa: F401  registers its names
from equivision_timm.models.adapted import Canonicalized, Symmetrized
from equivision_timm.models.backbone import EquivariantBackbone
from equivision_timm.models.equivariant_convnext import EquivariantConvNeXt
from equivision_timm.models.equivariant_fpn import EquivariantFPN
from equivision_timm.models.equivariant_resnet import EquivariantResNet
from equivision_timm.models.equivariant_vit import EquivariantViT
from equivision_timm.models.fuse import fuse
from equivision_timm.models.orientation import OrientationNet, ViewOrientationNet
from equivision_timm.models.variants import model_names

__all__ = [
    "Canonicalized",
    "EquivariantBackbone",
    "EquivariantConvNeXt",
    "EquivariantFPN",
    "EquivariantResNet",
    "EquivariantViT",
    "OrientationNet",
    "Symmetrized",
    "ViewOrientationNet",
    "fuse",
    "model_names",
]
