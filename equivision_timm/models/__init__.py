"""The models; importing this registers them with timm."""

from equivision_timm.models.equivariant_resnet import EquivariantResNet
from equivision_timm.models.equivariant_vit import EquivariantViT

__all__ = ["EquivariantResNet", "EquivariantViT"]
