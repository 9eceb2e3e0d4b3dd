"""Square crops of photographs, normalised as the networks were trained: what the checks of statistics look at."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, get_img_extensions

__all__ = ["load_crops"]

_LEAST, _MOST = 40, 256  # crops where the caller leaves the number open
_BUNDLED = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel", "coins")


def load_crops(folder: str | Path | None, count: int | None = None, size: int = 97) -> torch.Tensor:
    """Random crops of photographs, [count, 3, size, size] float32, the same at every call.

    Each crop is a square with 8 to 100 % of the largest one's area, as in the training of the original; half of them
    are mirrored. The photographs take turns.

    Args:
        folder: photographs, in sub-folders or not; None takes those that come with scikit-image.
        count: number of crops; None takes one of each photograph, at least 40, at most 256.
        size: side in pixels.

    Raises:
        OSError: the folder does not exist or a file in it is no picture.
        ValueError: there is no picture in the folder.
        ModuleNotFoundError: no folder is named and scikit-image is not installed.
    """
    photographs = _bundled() if folder is None else _from_folder(Path(folder), count or _MOST)
    count = count or max(_LEAST, len(photographs))
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    crops = [_crop(photographs[i % len(photographs)], size, generator) for i in range(count)]
    return (torch.stack(crops) - mean) / std


def _crop(photograph: np.ndarray, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random square of a photograph [H, W, 3] uint8, resized to [3, size, size], values 0 to 1."""
    height, width = photograph.shape[:2]
    area, row, column, mirror = torch.rand(4, generator=generator).tolist()
    side = max(1, round((0.08 + 0.92 * area) ** 0.5 * min(height, width)))
    top, left = round(row * (height - side)), round(column * (width - side))
    square = torch.from_numpy(photograph[top : top + side, left : left + side].copy()).permute(2, 0, 1) / 255
    crop = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return crop.flip(-1) if mirror < 0.5 else crop


def _from_folder(folder: Path, count: int) -> list[np.ndarray]:
    """Up to `count` photographs, spread evenly over the sorted files."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder of photographs")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in get_img_extensions() and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no photographs ({', '.join(get_img_extensions())})")
    files = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    return [np.asarray(Image.open(path).convert("RGB")) for path in files]


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
