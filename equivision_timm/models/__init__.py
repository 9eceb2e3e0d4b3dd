"""The models; importing this registers them with timm."""

from equivision_timm.models.equivariant_resnet import EquivariantResNet

__all__ = ["EquivariantResNet"]
