"""Rotation- and reflection-equivariant image backbones for timm. Importing the package registers the models.

It also registers the data set `torch/rotated_folder` for timm's scripts.
"""

from equivision_timm.starting import end_on_ctrl_c

end_on_ctrl_c()  # first: the imports below take seconds

from equivision_timm import models  # noqa: E402
from equivision_timm.images import rotation  # noqa: E402

__all__ = ["models", "rotation"]
__version__ = "0.1.0"
