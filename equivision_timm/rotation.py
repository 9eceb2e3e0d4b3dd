"""Rotation of images, and a data set of randomly rotated images for timm's scripts.

Importing this module registers `torch/rotated_folder` with timm, so that its unmodified scripts train and evaluate
under uniformly random rotation:

    python -m equivision_timm train.py --data-dir DIR --dataset torch/rotated_folder ...

A network that is equivariant under N rotations does multiples of 360 / N degrees by itself; training has to cover only
the angles up to 180 / N degrees: `torch/rotated_folder_22.5` for C8 and D8, `torch/rotated_folder_45` for C4 and D4,
and so on for the `LIMITS`. Evaluation is under all rotations with each of them.

The image is rotated before timm crops it, so that the corners of the crop hold pixels of the image, and beyond its
border its reflection; black corners would reveal the angle.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.dataset_factory import _TORCH_BASIC_DS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from equivision_timm.data import ImageFolder

__all__ = ["LIMITS", "OrientedFolder", "RotatedFolder", "inscribed_circle", "rotate", "rotate_image"]

LIMITS = (90, 45, 30, 22.5, 15, 11.25)  # degrees, for groups of 2, 4, 6, 8, 12 and 16 rotations


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate images [B, C, H, W] counter-clockwise about their centre by any finite angle.

    The nearest multiple of 90 degrees permutes pixels (an odd one swaps H and W); the rest, at most 45 degrees, is
    resampled bilinearly: output(x) = input(R(-angle) x). Beyond the border the image is reflected.
    """
    degrees = math.fmod(degrees, 360)
    quarters = round(degrees / 90)
    images = images.rot90(quarters, dims=(-2, -1))
    angle = math.radians(degrees - 90 * quarters)
    if angle == 0:
        return images
    height, width = images.shape[-2:]
    # Pixel centres measured from the centre of the image; y points down, as in `grid_sample`
    y = torch.arange(height, device=images.device, dtype=images.dtype)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device, dtype=images.dtype)[None, :] - (width - 1) / 2
    source_x = math.cos(angle) * x - math.sin(angle) * y
    source_y = math.sin(angle) * x + math.cos(angle) * y
    source = torch.stack([2 * source_x / width, 2 * source_y / height], dim=-1)  # [H, W, 2], borders at -1 and 1
    source = source.expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images, source, mode="bilinear", padding_mode="reflection", align_corners=False)


def inscribed_circle(images: torch.Tensor, part: float = 1) -> torch.Tensor:
    """Mask [H, W] of the pixels of images [..., H, W] inside the inscribed circle, or a part of its radius.

    Rotations map this disc to itself.
    """
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None, :] - (width - 1) / 2
    return torch.hypot(x, y) <= part * min(height, width) / 2


def rotate_image(image: Image.Image, degrees: float) -> Image.Image:
    """`rotate` for a PIL image of 8 bits per channel."""
    pixels = pil_to_tensor(image)[None].float()  # [1, C, H, W]
    return to_pil_image(rotate(pixels, degrees)[0].round().byte(), mode=image.mode)


class RotatedFolder(ImageFolder):
    """`ImageFolder`, each image rotated by a random angle; other arguments as there.

    Args:
        training: True draws a new angle, uniform in [-limit, limit] degrees, at each access, from PyTorch's generator,
            which the data-loader workers seed. False takes an angle uniform in [0, 360) degrees, a fixed function of
            the index, so that every model and every epoch gets the same images.
        limit: in degrees, above 0 and up to 180.
    """

    def __init__(self, root: str | Path, split: str, training: bool, limit: float = 180, **options: Any) -> None:
        if not 0 < limit <= 180:
            raise ValueError(f"images cannot be rotated by up to {limit} degrees: use a limit above 0 and up to 180")
        super().__init__(root, split, **options)
        self.training = training
        self.limit = limit

    def change(self, image: Image.Image, target: Any, index: int) -> tuple[Image.Image, Any]:
        """The picture, rotated."""
        if self.training:
            angle = self.limit * (2 * torch.rand(()).item() - 1)
        else:
            angle = 360 * np.random.default_rng(index).random()
        return rotate_image(image, angle), target


class OrientedFolder(RotatedFolder):
    """A folder of upright images, each rotated by any angle; the class is the nearest rotation of a group.

    It trains orientation networks. Classes count rotations by 360 / N degrees, counter-clockwise; sub-folders mean
    nothing. In training every second image is reflected before it is rotated: leave reflections of the data loader out
    (`--hflip 0`), since they reverse the rotation. Other arguments as in `RotatedFolder`.

    Args:
        rotations: N.
        spread: the largest distance from a rotation of the group, in degrees; None for 180 / N, so any angle.
    """

    def __init__(
        self, root: str | Path, split: str, training: bool, rotations: int, spread: float | None = None, **options: Any
    ) -> None:
        super().__init__(root, split, training, **options)
        self.rotations = rotations
        self.spread: float = 180 / rotations if spread is None else spread

    def change(self, image: Image.Image, target: Any, index: int) -> tuple[Image.Image, int]:
        """The picture, rotated, and the nearest rotation of the group."""
        draw = torch.rand(3).numpy() if self.training else np.random.default_rng(index).random(3)
        target = int(draw[0] * self.rotations)
        angle = 360 * target / self.rotations + self.spread * float(2 * draw[1] - 1)
        if self.training and draw[2] < 0.5:
            image = ImageOps.mirror(image)
        return rotate_image(image, angle), target


def _create(root: str, train: bool, download: bool = False, kind: Any = RotatedFolder, **options: Any) -> ImageFolder:
    """The data set for `timm.data.create_dataset`.

    To data sets whose names begin with 'torch/' timm passes on only whether the split is called 'train'. The other
    arguments of `create_dataset` (--class-map, --input-img-mode, the name of the split) are read from its frame.
    """
    if download:
        raise ValueError(f"a rotated folder reads {root!r} and downloads nothing: leave --dataset-download out")
    given = sys._getframe(1).f_locals
    options |= {name: given[name] for name in ("split", "class_map", "input_img_mode", "search_split")}
    return kind(root, training=train or given["is_training"], **options)


_NAMES: dict[str, Any] = _TORCH_BASIC_DS
_NAMES["rotated_folder"] = _create
_NAMES.update({f"rotated_folder_{limit}": partial(_create, limit=limit) for limit in LIMITS})
for _n in (4, 8):
    _oriented = partial(_create, kind=OrientedFolder, rotations=_n)
    _NAMES[f"oriented_folder_c{_n}"] = _oriented
    _NAMES[f"oriented_folder_c{_n}_15"] = partial(_oriented, spread=15)
_NAMES["oriented_folder"] = _NAMES["oriented_folder_c4"]
