"""Upright images under rotations, the rotation as their class: what orientation networks are trained on.

Importing this module adds `torch/oriented_folder_c4` and `torch/oriented_folder_c8` to timm's data sets.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from equivision_timm.groups import Group
from equivision_timm.images.rotation import _NAMES, RotatedFolder, rotate_image

__all__ = ["OrientedFolder"]


class OrientedFolder(RotatedFolder):
    """A folder of upright images, each rotated by any angle; its class is the nearest rotation of the group.

    Training draws the angle anew each time and reflects every second image before; in evaluation it is a fixed
    function of the index. Arguments as in `RotatedFolder`; sub-folders mean nothing. Leave reflections of the data
    loader out (`--hflip 0`): they reverse the rotation.

    Args:
        group: 'c4' or 'c8'; the class counts rotations by 360 / N degrees, counter-clockwise.
    """

    def __init__(self, root: str, train: bool, download: bool = False, group: str = "c4", **reader_options: Any):
        super().__init__(root, train, download, **reader_options)
        self.rotations = Group.from_name(group).rotations

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self._read(index)
        angle = 360 * (torch.rand(()).item() if self.train else np.random.default_rng(index).random())
        if self.train and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        image = rotate_image(image, angle)
        image = image if self.transform is None else self.transform(image)
        return image, round(angle * self.rotations / 360) % self.rotations


_NAMES.update({f"oriented_folder_{group}": partial(OrientedFolder, group=group) for group in ("c4", "c8")})
_NAMES["oriented_folder"] = OrientedFolder
