"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models.

It also registers the data set `torch/rotated_folder` for timm's scripts.
"""

from equivision_timm import models
from equivision_timm.images import rotation

__all__ = ["models", "rotation"]
__version__ = "0.1.0"
