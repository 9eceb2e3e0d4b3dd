"""Measures one model at one image size: every angle on every image, batch by batch.

The images are prepared as timm's `validate.py` prepares them (resize, crop, normalise), then turned. The unturned
image under the same treatment of the corners is the reference:

    top1, top5   the true class is the first, is among the first five
    agreement    the first class is the one of the reference
    drift        |z - z_0| / |z_0|, z the logits less their mean, which the softmax ignores, z_0 of the reference

A model that is not equivariant may predict from several rotations of an image: `averaged`. How far the maps of its
stages are from turning with the image says `equivision_timm.testing.angle_error`.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from equivision_timm.arguments import InputError
from equivision_timm.cli.rotate_eval.results import Cell
from equivision_timm.images.from_timm import folder_reader, picture_mode, preparation
from equivision_timm.images.pictures import PictureError, every_ending, open_rgb
from equivision_timm.images.rotation import inscribed_circle, rotate
from equivision_timm.testing import angle_error

__all__ = ["CORNERS", "TURNS", "Folder", "averaged", "in_circle", "measure", "parse_angles"]

CORNERS = ("reflect", "circle")
TURNS = (1, 2, 4)  # whose rotations move whole pixels
MOST_ANGLES = 3600


def parse_angles(text: str) -> list[float]:
    """The angles of 'start:stop:step' (stop included if it is met) or of a list '0,45,90', in degrees.

    Whole turns are taken off, and of angles that mean the same rotation the first is kept: 360 is 0, 270 is -90.

    Raises:
        InputError: neither of them, or more than 3600 angles.

    Example:
        >>> parse_angles("0:360:90")
        [0.0, 90.0, 180.0, 270.0]
    """
    separator = ":" if ":" in text else ","
    try:
        numbers = [float(part) for part in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)) or (separator == ":" and len(numbers) != 3):
        raise InputError(f"{text!r} is no list of angles: use START:STOP:STEP or A,B,C in degrees, such as 0:360:15")
    if separator == ":":
        numbers = _range(text, *numbers)
    if len(numbers) > MOST_ANGLES:
        raise InputError(f"{len(numbers)} angles are more than {MOST_ANGLES}: leave some out")
    turned = [math.fmod(number, 360) + 0.0 for number in numbers]  # + 0.0: no negative zero
    same = {}
    for angle in turned:
        same.setdefault(round(angle % 360, 6) % 360, angle)
    return list(same.values())


def _range(text: str, start: float, stop: float, step: float) -> list[float]:
    if step <= 0 or stop < start:
        raise InputError(f"{text!r} holds no angles: STEP must be positive and STOP not below START, as in 0:360:15")
    steps = (stop - start) / step + 1e-9
    if steps >= MOST_ANGLES:
        raise InputError(f"{text!r} holds more than {MOST_ANGLES} angles: use a larger STEP")
    return [start + step * i for i in range(math.floor(steps) + 1)]


class Folder(Dataset[tuple[torch.Tensor, int] | str]):
    """Images in one sub-folder per class, found by timm; an unreadable one comes as its name, not as an exception.

    Args:
        root: the folder, or the one above its splits.
        split: sub-folder to look for, as in `validate.py`.
        class_map: file that maps sub-folders to class indices, as in `validate.py`.

    Raises:
        InputError: no such folder or split, no images in it, a class map that cannot be read.
    """

    def __init__(self, root: str, split: str, class_map: str) -> None:
        if not os.path.isdir(root):
            raise InputError(f"no images to measure in {root!r}: there is no such folder")
        try:
            with every_ending():
                self.reader: ReaderImageFolder = folder_reader(root, split, class_map=class_map)
        except Exception as error:  # of the folder, or of the class map, which may be a pickle
            reason = str(error) or type(error).__name__
            raise InputError(f"no images to measure in {root!r}: {reason}") from error
        found = Path(self.reader.root) != Path(root) or Path(root, split).is_dir()
        if not found and split != "validation":  # the default may be missing
            raise InputError(f"{root!r} has no sub-folder {split!r}: name another --split, or leave it out")
        self.transform: Callable[[Image.Image], torch.Tensor] = pil_to_tensor  # until `prepare_for`
        self.mode: str = "RGB"

    def __len__(self) -> int:
        return len(self.reader)

    def names(self) -> list[str]:
        """The files, relative to the folder."""
        return list(map(str, self.reader.filenames()))

    @property
    def classes(self) -> list[str]:
        """The class folders; empty where the images lie in `root` itself."""
        return [name for name in self.reader.class_to_idx if name]

    @property
    def targets(self) -> set[Any]:
        """The class indices, which a class map may have made anything."""
        return set(self.reader.class_to_idx.values())

    def prepare_for(self, data_config: dict[str, Any]) -> "Folder":
        """Load images as the model of this timm data config wants them; returns itself.

        Raises:
            ValueError: the model takes neither grey nor RGB images.
        """
        _, height, width = data_config["input_size"]
        self.size: tuple[int, int] = (height, width)
        self.mode = picture_mode(data_config)
        self.transform = preparation(data_config)
        return self

    def sample(self) -> torch.Tensor:
        """A grey image [C, H, W], prepared for the model."""
        height, width = self.size
        return self.transform(Image.new(self.mode, (width, height), "gray"))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | str:
        try:
            return self.transform(self.picture(index)), self.reader.samples[index][1]
        except PictureError:
            return str(self.reader.filename(index))

    def picture(self, index: int) -> Image.Image:
        """The picture in the mode of the model.

        Raises:
            PictureError: it cannot be read.
        """
        return open_rgb(self.reader.samples[index][0]).convert(self.mode)


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


def averaged(model: nn.Module, turns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """images -> the mean of the logits over `turns` rotations of each, one of `TURNS`, 360 / turns degrees apart."""
    if turns == 1:
        return model

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(rotate(images, 360 / turns * k)) for k in range(turns)]).mean(0)

    return predict


def measure(
    cell: Cell,
    model: nn.Module,
    folder: Folder,
    angles: list[float],
    corners: str,
    labelled: bool,
    by_stage: bool,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Cell]:
    """Continue `cell` from its position; yields it anew after every batch.

    Args:
        cell: what has been measured so far, over how many rotations averaged.
        model: images [B, C, H, W] -> logits [B, classes], in eval mode.
        folder: the images, prepared for the model.
        angles: in degrees, counter-clockwise.
        corners: 'reflect': the image is reflected at its border; 'circle': at every angle, zero included, only the
            inscribed circle is shown, on the mean colour.
        labelled: whether the folder's classes are those of the model.
        by_stage: measure the error of every stage, too.
        batch_size: images at a time.
        workers: processes that load images.
        device: where to compute.
    """
    predict = averaged(model, cell.turns)
    rest = Subset(folder, range(cell.position, len(folder)))
    loader = DataLoader(rest, batch_size=batch_size, num_workers=workers, collate_fn=_collate)
    for batch in loader:
        sums, stages = {}, {}
        if batch.images is not None:
            images, targets = batch.images.to(device), batch.targets.to(device) if labelled else None
            sums = _sums(predict, images, targets, angles, corners)
            if by_stage:
                stages = _stages(cell, model, images, angles)
        cell = cell.add(batch.taken, batch.taken - len(batch.unreadable), batch.unreadable, sums, stages)
        yield cell


def _stages(cell: Cell, model: nn.Module, images: torch.Tensor, angles: list[float]) -> dict[str, list[float]]:
    """The sums of the errors of every stage over one batch, by angle."""
    try:
        errors = angle_error(model, images, angles)
    except ValueError as error:
        raise InputError(f"{cell.model!r} cannot be measured by stage at {cell.size} pixels: {error}") from error
    return {stage: [len(images) * value for value in by_angle.values()] for stage, by_angle in errors.items()}


@torch.inference_mode()
def _sums(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor | None,
    angles: list[float],
    corners: str,
) -> dict[str, list[float]]:
    """The sums of all metrics over one batch, by angle."""
    show = in_circle if corners == "circle" else nn.Identity()
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
    length = centred_reference.norm(dim=1).clamp_min(torch.finfo(reference.dtype).tiny)  # of one class, all are zero
    drift = (centred - centred_reference).norm(dim=1) / length
    sums = {"agreement": (first == reference.argmax(1)).sum().item(), "drift": drift.sum().item()}
    if targets is not None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        sums["top1"] = (first == targets).sum().item()
        sums["top5"] = (best == targets[:, None]).any(1).sum().item()
    return sums


def in_circle(images: torch.Tensor) -> torch.Tensor:
    """Zero, the mean colour after normalisation, outside the circle inscribed in images [B, C, H, W]."""
    return images * inscribed_circle(images)
