"""Former place of `open_rgb`."""

from equivision_timm.data import ENDINGS, PictureError, open_rgb

__all__ = ["ENDINGS", "PictureError", "open_rgb"]
