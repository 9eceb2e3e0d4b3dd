"""A folder of pictures as a data set: found as timm finds them, opened as every command here opens them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from equivision_timm.images.from_timm import folder_reader
from equivision_timm.images.pictures import PictureError, every_ending, open_rgb

__all__ = ["ImageFolder"]

_MOST_FAULTS = 50  # pictures one after another that cannot be read; timm's own limit


class ImageFolder(torch.utils.data.Dataset[tuple[Any, int]]):
    """Pictures, one sub-folder per class, 16 bits and all endings of `pictures.py` among them.

    Args:
        root: the folder, or the one above its splits.
        split: sub-folder to look for.
        **reader_options: passed to `timm.data.create_dataset`, such as `input_key`.

    Raises:
        ValueError: `root` is no folder. On reading, `PictureError` where fifty pictures one after another, or all,
            cannot be read.
    """

    def __init__(self, root: str, split: str, **reader_options: Any) -> None:
        with every_ending():
            self.reader: ReaderImageFolder = folder_reader(root, split, **reader_options)
        self.transform: Callable[[Any], Any] | None = None  # set by timm's loader
        self.target_transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self._read(index)
        image = self.change(image, index)
        image = image if self.transform is None else self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)

    def change(self, image: Image.Image, index: int) -> Image.Image:
        """What a subclass does to the picture before the transform."""
        return image

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The first picture from `index` on that can be read, as timm does it; the others are named in a warning."""
        reader, faults = self.reader, []
        for i in range(index, index + min(_MOST_FAULTS, len(reader))):
            i %= len(reader)
            try:
                path, target = reader.samples[i]
                image = open_rgb(path)
            except PictureError as error:
                faults.append(str(error))
                continue
            if faults:
                warnings.warn(f"{len(faults)} picture(s) left out: {'; '.join(faults)}", stacklevel=2)
            return image, target
        raise PictureError(f"{len(faults)} pictures one after another cannot be read, such as: {faults[0]}")

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """As in timm's `ImageDataset`."""
        return str(self.reader.filename(index, basename, absolute))

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """As in timm's `ImageDataset`."""
        return list(map(str, self.reader.filenames(basename, absolute)))
