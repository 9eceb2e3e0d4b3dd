"""Rotated images: the rotation itself, and a folder of images under random rotation for timm's scripts.

timm has no option for it. Importing this module adds the data set `torch/rotated_folder` to the ones timm knows, so
that its unmodified scripts train and evaluate under uniformly random rotation:

    train.py    --device-modules equivision_timm --data-dir DIR --dataset torch/rotated_folder ...
    python -m equivision_timm validate.py --data-dir DIR --dataset torch/rotated_folder ...

A group of N rotations does the rotations by multiples of 360 / N degrees itself, and leaves those up to 180 / N degrees
to training: `torch/rotated_folder_22.5` for C8 and D8, `torch/rotated_folder_45` for C4 and D4, and so on for the
`LIMITS`. Validation is under all rotations with each of them.

The whole image turns before timm crops it: where it reaches, the corners of the crop hold pixels of the image, and
beyond that its reflection, not black triangles that tell the angle.
"""

import math
import os
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.dataset_factory import _TORCH_BASIC_DS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from equivision_timm.images.folder import ImageFolder

__all__ = ["LIMITS", "RotatedFolder", "inscribed_circle", "rotate", "rotate_image"]

LIMITS = (90, 45, 30, 22.5, 15, 11.25)  # degrees: what groups of 2, 4, 6, 8, 12 and 16 rotations leave over


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn images [B, C, H, W] counter-clockwise about their centre.

    The nearest multiple of 90 degrees moves whole pixels (and swaps H and W where it is odd); only the rest, at most
    45 degrees, resamples, bilinearly: output(x) = input(R(-angle) x). Beyond the border the image is reflected.

    Args:
        images: floating point.
        degrees: any finite angle; counts modulo 360.

    Raises:
        ValueError: the angle is not finite.
    """
    if not math.isfinite(degrees):
        raise ValueError(f"images cannot be turned by {degrees} degrees: give a finite angle")
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


def inscribed_circle(images: torch.Tensor) -> torch.Tensor:
    """[H, W], which pixels of images [..., H, W] lie inside the inscribed circle, that every rotation keeps."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None, :] - (width - 1) / 2
    return torch.hypot(x, y) <= min(height, width) / 2


def rotate_image(image: Image.Image, degrees: float) -> Image.Image:
    """`rotate` for a PIL image of 8 bits a channel."""
    pixels = pil_to_tensor(image)[None].float()  # [1, C, H, W]
    return to_pil_image(rotate(pixels, degrees)[0].round().byte(), mode=image.mode)


class RotatedFolder(ImageFolder):
    """A folder of images, one sub-folder per class, each image turned by a random angle.

    For training it is uniform in [-limit, limit] degrees and drawn anew each time, from PyTorch's generator, which the
    data-loader workers seed. For evaluation it is uniform in [0, 360) degrees whatever the limit, and a fixed function
    of the index, so that every model and every epoch meets the same images.

    The signature is the one timm gives to torchvision's data sets, which knows training and evaluation only: the
    folder `train` or `training` of `root` is used for the one, `validation`, `val`, ... for the other, `root` itself
    where there is none. For a split of another name give its folder as `root`.

    Args:
        root: the folder.
        train: draw random angles, and look for the training split.
        download: must be False: there is nothing to download.
        limit: the largest angle in training, in degrees, above 0 and up to 180.
        reader_options: passed to `timm.data.create_dataset`, such as `input_key`.

    Raises:
        ValueError: `download` is set, `root` is no folder, or there is no such limit. On reading, `PictureError` where
            fifty pictures one after another, or all, cannot be read.
    """

    def __init__(
        self, root: str, train: bool, download: bool = False, limit: float = 180, **reader_options: Any
    ) -> None:
        if download:
            raise ValueError(f"rotated_folder reads {root!r} and downloads nothing: leave --dataset-download out")
        if not os.path.isdir(root):
            raise ValueError(f"there is no folder {str(root)!r} of images: give another --data-dir")
        if not 0 < limit <= 180:
            raise ValueError(f"images cannot be turned by up to {limit} degrees: use a limit above 0 and up to 180")
        super().__init__(root, "train" if train else "validation", **reader_options)
        self.train = train
        self.limit = limit

    def change(self, image: Image.Image, index: int) -> Image.Image:
        """The picture, rotated."""
        if self.train:
            angle = self.limit * (2 * torch.rand(()).item() - 1)
        else:
            angle = 360 * np.random.default_rng(index).random()
        return rotate_image(image, angle)


_NAMES: dict[str, Any] = _TORCH_BASIC_DS
_NAMES["rotated_folder"] = RotatedFolder
_NAMES.update({f"rotated_folder_{limit}": partial(RotatedFolder, limit=limit) for limit in LIMITS})
