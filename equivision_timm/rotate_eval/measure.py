"""Measures one model at one image size: every angle on every image, batch by batch.

The images are prepared as timm's `validate.py` prepares them (resize, crop, normalise), then turned. The unturned
image under the same treatment of the corners is the reference:

    top1, top5   the true class is the first, is among the first five
    agreement    the first class is the one of the reference
    drift        |z - z_0| / |z_0|, z the logits less their mean, which the softmax ignores, z_0 of the reference
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, Subset

from equivision_timm.loading import InputError
from equivision_timm.rotate_eval.results import Cell
from equivision_timm.rotation import rotate

__all__ = ["CORNERS", "Folder", "measure", "parse_angles"]

CORNERS = ("reflect", "circle")


def parse_angles(text: str) -> list[float]:
    """The angles of 'start:stop:step' (stop included if it is met) or of a list '0,45,90', in degrees.

    Raises:
        InputError: neither of them.

    Example:
        >>> parse_angles("0:90:45")
        [0.0, 45.0, 90.0]
    """
    separator = ":" if ":" in text else ","
    try:
        numbers = [float(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or (separator == ":" and len(numbers) != 3):
        raise InputError(f"{text!r} is no list of angles: use START:STOP:STEP or A,B,C in degrees, such as 0:360:15")
    if separator == ",":
        return numbers
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise InputError(f"{text!r} holds no angles: STEP must be positive and STOP not below START, as in 0:360:15")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > 3600:
        raise InputError(f"{text!r} holds {count} angles, more than 3600: use a larger STEP")
    return [start + step * i for i in range(count)]


class Folder(Dataset):
    """Images in one sub-folder per class, found by timm; an unreadable one comes as its name, not as an exception.

    Args:
        root: the folder, or the one above its splits.
        split: sub-folder to look for, as in `validate.py`.
        class_map: file that maps sub-folders to class indices, as in `validate.py`.

    Raises:
        InputError: no such folder, or no images in it.
    """

    def __init__(self, root: str, split: str, class_map: str) -> None:
        try:
            self.reader = create_dataset("", root, split=split, class_map=class_map).reader
        except (AssertionError, RuntimeError, OSError) as error:
            reason = str(error) or "there is no such folder"
            raise InputError(f"no images to measure in {root!r}: {reason}") from error
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None
        self.mode = "RGB"

    def __len__(self) -> int:
        return len(self.reader)

    def names(self) -> list[str]:
        return self.reader.filenames()

    @property
    def classes(self) -> list[str]:
        """The class folders; empty where the images lie in `root` itself."""
        return [name for name in self.reader.class_to_idx if name]

    def prepare_for(self, data_config: dict[str, Any]) -> None:
        """Load images as the model of this timm data config wants them."""
        self.mode = "L" if data_config["input_size"][0] == 1 else "RGB"
        self.transform = create_transform(**data_config, is_training=False)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | str:
        file, target = self.reader[index]
        try:
            with file, Image.open(file) as image:
                return self.transform(image.convert(self.mode)), target
        except (OSError, SyntaxError):  # what PIL raises for empty, truncated and foreign files
            return self.reader.filename(index)


@dataclass(frozen=True)
class _Batch:
    images: torch.Tensor | None  # [B, C, H, W]; None where all are unreadable
    targets: torch.Tensor | None  # [B]
    unreadable: list[str]
    taken: int


def _collate(samples: list[tuple[torch.Tensor, int] | str]) -> _Batch:
    good = [sample for sample in samples if not isinstance(sample, str)]
    return _Batch(
        images=torch.stack([image for image, _ in good]) if good else None,
        targets=torch.tensor([target for _, target in good]) if good else None,
        unreadable=[sample for sample in samples if isinstance(sample, str)],
        taken=len(samples),
    )


def measure(
    cell: Cell,
    predict: Callable[[torch.Tensor], torch.Tensor],
    folder: Folder,
    angles: list[float],
    corners: str,
    labelled: bool,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Cell]:
    """Continue `cell` from its position; yields it anew after every batch.

    Args:
        cell: what has been measured so far.
        predict: images [B, C, H, W] -> logits [B, classes].
        folder: the images, prepared for the model.
        angles: in degrees, counter-clockwise.
        corners: 'reflect': the image is reflected at its border; 'circle': at every angle, zero included, only the
            inscribed circle is shown, on the mean colour.
        labelled: whether the folder's classes are those of the model.
        batch_size: images at a time.
        workers: processes that load images.
        device: where to compute.
    """
    rest = Subset(folder, range(cell.position, len(folder)))
    loader = DataLoader(rest, batch_size=batch_size, num_workers=workers, collate_fn=_collate)
    for batch in loader:
        sums = {}
        if batch.images is not None:
            targets = batch.targets.to(device) if labelled else None
            sums = _sums(predict, batch.images.to(device), targets, angles, corners)
        images = batch.taken - len(batch.unreadable)
        cell = cell.add(batch.taken, images, batch.unreadable, sums)
        yield cell


@torch.inference_mode()
def _sums(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor | None,
    angles: list[float],
    corners: str,
) -> dict[str, list[float]]:
    """The sums of all metrics over one batch, by angle."""
    show = _in_circle if corners == "circle" else nn.Identity()
    reference = predict(show(images)).float()
    sums: dict[str, list[float]] = {}
    for angle in angles:
        turned = angle % 360 != 0
        logits = predict(show(rotate(images, angle))).float() if turned else reference
        for name, value in _compare(logits, reference, targets).items():
            sums.setdefault(name, []).append(value)
    return sums


def _compare(logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor | None) -> dict[str, float]:
    first = logits.argmax(1)
    centred, centred_reference = (z - z.mean(1, keepdim=True) for z in (logits, reference))
    drift = (centred - centred_reference).norm(dim=1) / centred_reference.norm(dim=1)
    sums = {"agreement": (first == reference.argmax(1)).sum().item(), "drift": drift.sum().item()}
    if targets is not None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        sums["top1"] = (first == targets).sum().item()
        sums["top5"] = (best == targets[:, None]).any(1).sum().item()
    return sums


def _in_circle(images: torch.Tensor) -> torch.Tensor:
    """Zero, the mean colour after normalisation, outside the circle inscribed in images [B, C, H, W]."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device)[None, :] - (width - 1) / 2
    return images * (torch.hypot(x, y) <= min(height, width) / 2)
