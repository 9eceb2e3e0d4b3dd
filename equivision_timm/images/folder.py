"""Former place of `ImageFolder`."""

from equivision_timm.data import ImageFolder

__all__ = ["ImageFolder"]
