"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models."""

from equivision_timm import models

__all__ = ["models"]
__version__ = "0.1.0"
