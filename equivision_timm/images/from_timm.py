"""Former place of `preparation`."""

from equivision_timm.data import preparation

__all__ = ["preparation"]
