"""Pictures: read from files, found in folders with one sub-folder per class, prepared for models by timm.

8 bits per channel are read as they are, and of colour with 16 bits per channel the upper 8 (as Pillow does). A grey
channel of more than 8 bits, as microscopes and satellites write it, is scaled to 0 ... 255 from the range of its type:
0 ... 65535 for 16-bit integers, 0 ... 1 for floating-point numbers. Values that contradict this range are an error:
32-bit integers, floats beyond 0 ... 1, and 16-bit pictures that use less than the lower sixteenth of the range, which
hold 12 bits or fewer and would become nearly black.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_transform
from timm.data.dataset_factory import _search_split
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torchvision.transforms import Compose, Grayscale

from equivision_timm.errors import InputError, reason

__all__ = [
    "ENDINGS",
    "ImageFolder",
    "PictureError",
    "draw_crops",
    "find_photographs",
    "find_pictures",
    "load_crops",
    "load_photographs",
    "open_rgb",
    "preparation",
]

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".avif", ".bmp")  # of picture files in folders
_WHITE_IS_ZERO = 262, 0  # tag and value in a TIFF file; Pillow inverts 8 bits, but not 16
_MOST_FAULTS = 50  # consecutive unreadable pictures of a data set


class PictureError(InputError):
    """A picture file that cannot be read; the message names the file and a remedy."""


def open_rgb(path: str | Path) -> Image.Image:
    """The picture in a file as RGB with 8 bits per channel; the first one if the file holds several.

    Transparency is dropped, and an orientation in the metadata ignored, as timm does it.

    Raises:
        PictureError: Pillow cannot read the file, or its range of values is unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; sizes that Pillow still reads
            with Image.open(path) as file:
                if file.mode.startswith("I") or file.mode == "F":
                    return Image.fromarray(_scale(file)).convert("RGB")
                return (file.convert("RGBA") if "transparency" in file.info else file).convert("RGB")
    except Exception as error:  # damaged files raise a dozen types in Pillow
        fault = f"cannot read the picture {str(path)!r} ({reason(error, 200)})"
        raise PictureError(f"{fault}: name another one, or convert it to 8 bits") from error


def _scale(file: Image.Image) -> np.ndarray:
    """The channel of a grey picture with more than 8 bits, [H, W] uint8."""
    values = np.asarray(file)
    low, high = values.min(), values.max()
    white, least = (1.0, 0.0) if file.mode == "F" else (65535.0, 4096.0)
    is_known = file.mode == "F" or file.mode.startswith("I;16") or file.format in ("PNG", "PPM")  # at most 16 bits
    if not (is_known and low >= 0 and high <= white and (high >= least or high == 0)):
        expected = f"black is 0 and white {white:g}" if is_known else "white is unknown"
        raise ValueError(f"its values are from {low:g} to {high:g}, where {expected}")
    grey = values * (255 / white)
    tag, white_is_zero = _WHITE_IS_ZERO
    if isinstance(file, TiffImageFile) and file.tag_v2.get(tag) == white_is_zero:
        grey = 255 - grey
    return np.rint(grey).astype(np.uint8)


def find_pictures(folder: str | Path) -> list[str]:
    """The picture files in a folder and its sub-folders, in natural order ('2.png' before '10.png')."""
    files = (os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted((file for file in files if os.path.splitext(file)[1].lower() in ENDINGS), key=natural_key)


class ImageFolder(ImageDataset):
    """Pictures in one sub-folder per class, found, numbered and split by timm, of all `ENDINGS`, read by `open_rgb`.

    Args:
        root: the folder, or the one above its splits.
        split: name of a sub-folder of `root` or a synonym as in timm; without such a sub-folder `root` itself is read.
        class_map: file with the classes, as `--class-map` of timm's scripts; sub-folders that it lacks are left out.
        input_img_mode: of the pictures, 'RGB' or 'L' (grey).
        search_split: False reads `root` itself.

    Raises:
        InputError: `root` does not exist or has no pictures, or the class map cannot be read.
    """

    def __init__(
        self, root: str | Path, split: str, class_map: Any = "", input_img_mode: str = "RGB", search_split: bool = True
    ) -> None:
        self.root: str = _search_split(str(root), split) if search_split else str(root)
        try:
            reader: Any = ReaderImageFolder(self.root, class_map, ";".join(ENDINGS))
        except Exception as error:  # of pickle, the file system, timm
            named = f" and classes in {str(class_map)!r}" if class_map else ""
            fault = f"there is no folder {self.root!r} with pictures ({' '.join(ENDINGS)}){named}"
            raise InputError(f"{fault}: {reason(error)}") from error
        super().__init__(root, reader, input_img_mode=input_img_mode)
        self.samples: list[tuple[str, Any]] = reader.samples  # paths and classes
        self.class_to_idx: dict[str, Any] = reader.class_to_idx
        self._faults = 0  # consecutive unreadable pictures

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The picture and its class; an unreadable picture is replaced by the next one, with a warning, as in timm.

        Raises:
            PictureError: 50 consecutive pictures, or all, cannot be read.
        """
        target = self.samples[index][1]
        try:
            image = self.picture(index)
        except PictureError as error:
            self._faults += 1
            if self._faults >= min(_MOST_FAULTS, len(self)):
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            return self[(index + 1) % len(self)]
        self._faults = 0
        image, target = self.change(image, target, index)
        image = image if self.transform is None else self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)

    def picture(self, index: int) -> Image.Image:
        """The picture in `input_img_mode`, before any transform."""
        return open_rgb(self.samples[index][0]).convert(self.input_img_mode)

    def change(self, image: Image.Image, target: Any, index: int) -> tuple[Image.Image, Any]:
        """Hook for subclasses: the picture before the transform, and its class."""
        return image, target


def preparation(config: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The transform of timm's `validate.py` for a data config of 1 or 3 channels: an RGB picture -> [C, H, W]."""
    transform: Any = create_transform(**config, is_training=False)
    return Compose([Grayscale(), transform]) if config["input_size"][0] == 1 else transform


# Crops of photographs, on which the statistics of weights are checked

_LEAST, _MOST = 40, 256  # default numbers of crops and of photographs
_PIXELS = 1 << 20  # larger photographs are shrunk
_BUNDLED = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel", "coins")


def load_crops(folder: str | Path | None, count: int | None = None, size: int = 97) -> torch.Tensor:
    """`draw_crops` from `load_photographs`, [count, 3, size, size] float32, the same at every call."""
    return draw_crops(load_photographs(folder, count or _MOST), count, size)


def draw_crops(photographs: list[np.ndarray], count: int | None = None, size: int = 97, seed: int = 0) -> torch.Tensor:
    """Random crops of photographs [H, W, 3] uint8, normalised as for ImageNet: [count, 3, size, size] float32.

    Each crop is a square of 8 to 100 % of the largest square's area, as in the training of equivision; half of them
    are mirrored. Crop i is from photograph i modulo their number; without `count` one from each, at least 40.
    """
    count = count or max(_LEAST, len(photographs))
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    crops = [_crop(photographs[i % len(photographs)], size, generator) for i in range(count)]
    return (torch.stack(crops) - mean) / std


def _crop(photograph: np.ndarray, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random square of a photograph [H, W, 3] uint8, resized to [3, size, size], values in 0 ... 1."""
    height, width = photograph.shape[:2]
    area, row, column, mirror = torch.rand(4, generator=generator).tolist()
    side = max(1, round((0.08 + 0.92 * area) ** 0.5 * min(height, width)))
    top, left = round(row * (height - side)), round(column * (width - side))
    square = torch.from_numpy(photograph[top : top + side, left : left + side].copy()).permute(2, 0, 1) / 255
    crop = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if mirror < 0.5 else crop


def load_photographs(folder: str | Path | None, count: int = _MOST) -> list[np.ndarray]:
    """Photographs, [H, W, 3] uint8 each, shrunk to a megapixel.

    Args:
        folder: searched with its sub-folders; None takes the photographs of scikit-image.
        count: at most so many, spread evenly over the sorted files of the folder.
    """
    if folder is None:
        from skimage import data

        bundled = [getattr(data, name)() for name in _BUNDLED] + [data.stereo_motorcycle()[0]]
        return [np.broadcast_to(a[..., None], (*a.shape, 3)) if a.ndim == 2 else a for a in bundled]
    files = find_photographs(folder)
    files = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    photographs = []
    for picture in map(open_rgb, files):
        scale = min(1, (_PIXELS / (picture.width * picture.height)) ** 0.5)
        size = [max(1, int(side * scale)) for side in picture.size]
        photographs.append(np.asarray(picture if scale == 1 else picture.resize(size, reducing_gap=3.0)))
    return photographs


def find_photographs(folder: str | Path) -> list[Path]:
    """The paths of the pictures in a folder, sorted. Raises InputError if there are none."""
    files = sorted(map(Path, find_pictures(folder)))
    if not files:
        raise InputError(f"{folder} holds no photographs ({', '.join(ENDINGS)}): name another folder")
    return files
