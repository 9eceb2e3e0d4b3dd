"""The most probable classes of image files: what `equivision-timm predict` calls.

The model and its images are made as in training, see `trained.py`.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from tqdm import tqdm

from equivision_timm.arguments import InputError, check_number, one_line
from equivision_timm.cli.loading import check_model_name
from equivision_timm.cli.trained import class_names, data_config, load_trained, read_class_map
from equivision_timm.cli.trial import MOST_PIXELS, check_memory, explained, find_device, try_model
from equivision_timm.files import check_writable, write_file
from equivision_timm.images.from_timm import picture_mode, preparation
from equivision_timm.images.pictures import ENDINGS, PictureError, open_rgb
from equivision_timm.models.attributes import attribute

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """One row of the result: a class of an image.

    Attributes:
        file: the image.
        rank: 1 is the most probable class.
        index: number of the class.
        name: name of the class; its number where no name is known.
        probability: between 0 and 1.
    """

    file: str
    rank: int
    index: int
    name: str
    probability: float


def predict(
    images: list[Path],
    model: str,
    class_map: Path | None = None,
    topk: int | None = None,
    format: str = "csv",
    out: Path | None = None,
    size: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> bool:
    """Write the most probable classes of every image, to a file or to stdout, when all are done.

    Args:
        images: files, or folders whose pictures are taken at any depth.
        model: `NAME` (pretrained weights) or `NAME=CHECKPOINT`.
        class_map: names of the classes: a file with one a line, or the folder of the training images.
        topk: how many classes of each image; five, or all of fewer, where None.
        format: 'csv' or 'json'.
        out: the file; None prints.
        size: side of the images in pixels; that of the checkpoint's training, or the model's own, where None.
        batch_size: images at a time.
        device: where to compute; the GPU where None and there is one.

    Returns:
        Whether every file could be read; the others are named on stderr and left out.

    Raises:
        InputError: something given cannot be used, no file can be read, or there is too little memory.
        OSError: the result could not be written after all; an old file is untouched.
    """
    check_number("--size", size, 1, MOST_PIXELS)
    check_number("--batch-size", batch_size, 1, sys.maxsize)
    check_number("--topk", topk, 1, sys.maxsize)
    check_model_name(model)
    if out is not None:
        check_writable(out, make_folders=True)
    files = _find(images)
    names = None if class_map is None else read_class_map(class_map)
    target = find_device(device)

    network, training = load_trained(model)
    network = network.to(target)
    config = data_config(network, training, size)
    side = config["input_size"][-1]
    try:
        mode = picture_mode(config)
    except ValueError as error:
        raise InputError(f"{model!r}: {error}") from error
    batch_size = min(batch_size, len(files))
    check_memory("--batch-size or --size", batch_size, side)
    prepare = preparation(config)
    with explained(model, batch_size, side, target, "lower --batch-size or --size"):
        grey = torch.zeros(config["input_size"])
        try_model(model, network, lambda: grey, side, target)
        names = class_names(model, network, names)
        topk = _check_topk(topk, attribute(network, "num_classes", int))
        rows: list[Prediction] = []
        with tqdm(total=len(files), unit="image", file=sys.stderr) as progress:
            for start in range(0, len(files), batch_size):
                chunk = files[start : start + batch_size]
                pictures = dict(_read(chunk, mode))
                if pictures:
                    batch = torch.stack([prepare(picture) for picture in pictures.values()])  # [b, C, side, side]
                    rows += _rows(network, batch.to(target), list(pictures), names, topk)
                progress.update(len(chunk))
    done = len({row.file for row in rows})
    if not done:
        raise InputError(f"none of the {len(files)} images can be read, such as {str(files[0])!r}")
    text = _as_text(rows, format)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text.encode())
    return done == len(files)


def _find(images: list[Path]) -> list[str]:
    """The files, and the pictures in the folders, each once, those of a folder in natural order."""
    found: dict[str, None] = {}
    for path in images:
        if path.is_dir():
            inside = find_images_and_targets(str(path), types=ENDINGS)[0]
            if not inside:
                raise InputError(f"there are no pictures ({' '.join(ENDINGS)}) in the folder {str(path)!r}")
            found |= dict.fromkeys(file for file, _ in inside)
        elif path.exists():
            found[str(path)] = None
        else:
            raise InputError(f"there is no image or folder {str(path)!r}")
    return list(found)


def _check_topk(topk: int | None, classes: int) -> int:
    check_number("--topk", topk, 1, classes)
    return min(5, classes) if topk is None else topk


def _read(files: list[str], mode: str) -> Iterator[tuple[str, Image.Image]]:
    """Those of the files that can be read, with their pictures; the others are named on stderr."""
    for file in files:
        try:
            yield file, open_rgb(file).convert(mode)
        except PictureError as error:  # noqa: PERF203  the other files still count
            tqdm.write(one_line(f"predict: left out: {error}"), file=sys.stderr)


@torch.inference_mode()
def _rows(model: nn.Module, batch: torch.Tensor, files: list[str], names: list[str], topk: int) -> list[Prediction]:
    """The best `topk` classes of images [B, C, H, W]."""
    probabilities, indices = model(batch).float().softmax(1).cpu().topk(topk)  # [B, topk] each
    return [
        Prediction(_text(file), rank, index, names[index], probability)
        for file, best, values in zip(files, indices.tolist(), probabilities.tolist(), strict=True)
        for rank, (index, probability) in enumerate(zip(best, values, strict=True), start=1)
    ]


def _text(name: str) -> str:
    """A file name as text: bytes that are none are written out."""
    return name.encode(errors="backslashreplace").decode()


def _as_text(rows: list[Prediction], format: str) -> str:
    """The rows as CSV, a row each, or as JSON, an object for each image."""
    if format == "json":
        images: dict[str, list[dict]] = {}
        for row in rows:
            entry = asdict(row)
            images.setdefault(entry.pop("file"), []).append(entry)
        return json.dumps([{"file": file, "classes": classes} for file, classes in images.items()], indent=1) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "probability": f"{row.probability:.6f}"} for row in rows)
    return text.getvalue()
