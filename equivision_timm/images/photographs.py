"""Square crops of photographs, normalised as the networks were trained: what the checks of statistics look at."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from equivision_timm.arguments import InputError
from equivision_timm.images.pictures import ENDINGS, PictureError, open_rgb

__all__ = ["draw_crops", "find_photographs", "load_crops", "load_photographs"]

_LEAST, _MOST = 40, 256  # crops where the caller leaves the number open; photographs
_PIXELS = 1 << 20  # of a photograph that is kept; larger ones are shrunk
_BUNDLED = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel", "coins")


def load_crops(folder: str | Path | None, count: int | None = None, size: int = 97) -> torch.Tensor:
    """`draw_crops` from `load_photographs`, [count, 3, size, size] float32, the same at every call."""
    return draw_crops(load_photographs(folder, count or _MOST), count, size)


def draw_crops(photographs: list[np.ndarray], count: int | None = None, size: int = 97, seed: int = 0) -> torch.Tensor:
    """Random crops of photographs, [count, 3, size, size] float32.

    Each crop is a square with 8 to 100 % of the largest one's area, as in the training of the original; half of them
    are mirrored. The photographs take turns.

    Args:
        photographs: [H, W, 3] uint8 each.
        count: number of crops; None takes one of each photograph, at least 40.
        size: side in pixels.
        seed: of the random numbers.
    """
    count = count or max(_LEAST, len(photographs))
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    crops = [_crop(photographs[i % len(photographs)], size, generator) for i in range(count)]
    return (torch.stack(crops) - mean) / std


def load_photographs(folder: str | Path | None, count: int = _MOST) -> list[np.ndarray]:
    """Photographs, [H, W, 3] uint8 each, of at most a megapixel: larger ones are shrunk as they are read.

    A file that cannot be read is named in a warning and left out.

    Args:
        folder: photographs, in sub-folders or not; None takes those that come with scikit-image.
        count: how many at most, spread evenly over the sorted files of the folder.

    Raises:
        InputError: the folder does not exist, there is no picture in it, or none that can be read.
        ModuleNotFoundError: no folder is named and scikit-image is not installed.
    """
    if folder is None:
        return _bundled()
    files = find_photographs(folder)
    files = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    photographs = [photograph for path in files if (photograph := _read(path)) is not None]
    if not photographs:
        raise InputError(f"no photograph of the {len(files)} in {folder} can be read: name another folder")
    return photographs


def find_photographs(folder: str | Path) -> list[Path]:
    """The picture files in a folder and its sub-folders, sorted, unread.

    Raises:
        InputError: the folder does not exist, or there is no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of photographs: give the name of one")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise InputError(f"{folder} holds no photographs ({', '.join(ENDINGS)}): name another folder")
    return files


def _read(path: Path) -> np.ndarray | None:
    try:
        picture = open_rgb(path)
    except PictureError as error:
        warnings.warn(f"left out: {error}", stacklevel=4)
        return None
    scale = (_PIXELS / (picture.width * picture.height)) ** 0.5
    if scale < 1:
        picture = picture.resize([max(1, int(side * scale)) for side in picture.size], reducing_gap=3.0)
    return np.asarray(picture)


def _crop(photograph: np.ndarray, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random square of a photograph [H, W, 3] uint8, resized to [3, size, size], values 0 to 1."""
    height, width = photograph.shape[:2]
    area, row, column, mirror = torch.rand(4, generator=generator).tolist()
    side = max(1, round((0.08 + 0.92 * area) ** 0.5 * min(height, width)))
    top, left = round(row * (height - side)), round(column * (width - side))
    square = torch.from_numpy(photograph[top : top + side, left : left + side].copy()).permute(2, 0, 1) / 255
    crop = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if mirror < 0.5 else crop


def _bundled() -> list[np.ndarray]:
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "no photographs: name a folder of a dozen or more (--images DIR), "
            "or have scikit-image's: pip install 'equivision-timm[convert]'"
        ) from error
    grey_or_colour = [getattr(data, name)() for name in _BUNDLED] + [data.stereo_motorcycle()[0]]
    return [np.broadcast_to(a[..., None], (*a.shape, 3)) if a.ndim == 2 else a for a in grey_or_colour]
