"""What timm makes for a folder of images and for a model's pictures, with the type that it has there."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.transforms import Compose

__all__ = ["folder_reader", "image_dataset", "picture_mode", "preparation"]


def image_dataset(root: str, split: str, **options: Any) -> ImageDataset:
    """timm's data set of the images in a folder, one sub-folder a class.

    Args:
        root: the folder, or the one above its splits.
        split: sub-folder to look for.
        **options: of `timm.data.create_dataset`.

    Raises:
        ValueError: the options make another data set.
    """
    dataset = create_dataset("", root, split=split, **options)
    if not isinstance(dataset, ImageDataset):
        raise ValueError(f"{options} make a {type(dataset).__name__} of {root!r}, no ImageDataset: leave them out")
    return dataset


def folder_reader(root: str, split: str, **options: Any) -> ReaderImageFolder:
    """What finds and names the images of `image_dataset`.

    Raises:
        ValueError: `root` is no folder.
    """
    reader = image_dataset(root, split, **options).reader
    if not isinstance(reader, ReaderImageFolder):
        raise ValueError(f"{root!r} is no folder of images, timm reads it by {type(reader).__name__}")
    return reader


def picture_mode(config: dict[str, Any]) -> str:
    """The mode of pictures for the model of a timm data config, 'L' or 'RGB'.

    Raises:
        ValueError: the model takes neither grey nor RGB images.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"it takes images of {channels} channels, and pictures have 1 or 3: use another model")
    return "L" if channels == 1 else "RGB"


def preparation(config: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """A picture -> [C, H, W], as the model of a timm data config wants it."""
    transform = create_transform(**config, is_training=False)
    if not isinstance(transform, Compose):
        raise ValueError(f"{config} asks for the transforms of training: leave `separate` out")
    return transform
