"""The command `predict`: the most probable classes of image files."""

import argparse
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from equivision_timm.cli.models import check_spec, find_device, load, read_class_map
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options, integer
from equivision_timm.data import ENDINGS, PictureError, find_pictures, open_rgb, preparation
from equivision_timm.errors import InputError, one_line
from equivision_timm.files import check_writable, write_file

__all__ = ["Prediction", "register"]


@dataclass(frozen=True)
class Prediction:
    """A row of the result: one class of one image."""

    file: str  # the image
    rank: int  # 1 for the most probable class
    index: int  # number of the class, from 0: its place among the outputs of the model
    name: str  # name of the class; its number if no name is known
    probability: float  # softmax of the logits, between 0 and 1


def register(commands: Parsers) -> None:
    text = "the most probable classes of image files"
    more = """Writes a row for each image and class: file; rank, 1 for the most probable class; index, the
        number of the class from 0, as in the outputs of the model; name, that of --class-map, of the weights or
        of ImageNet, else the index; probability, the softmax of the logits, which over all classes sums to 1.
        Checkpoints of timm's train.py determine number of classes, image size and normalisation. Files that
        cannot be read are reported and left out; the exit status is then 1."""
    parser = add_command(commands, "predict", run, "nothing was written", text, more)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|DIR", help="files, or folders, searched at any depth")
    add_model(parser)
    add("--topk", type=integer(1), default=5, metavar="K", help="classes of each image, or all if there are fewer (5)")
    add("--format", choices=("csv", "json"), default="csv", help="format of the result (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="file to write (default: print)")
    add_options(parser, "class-map", "size", "batch-size", "device", batch_size=32)


def run(args: argparse.Namespace) -> int:
    """Write the classes of all images when all are computed; returns the exit status, 1 if a file was left out."""
    check_spec(args.model)
    if args.out is not None:
        check_writable(args.out, make_folders=True)
    files = list(dict.fromkeys(itertools.chain.from_iterable(map(_files, args.images))))
    names = None if args.class_map is None else read_class_map(args.class_map)
    device = find_device(args.device)
    loaded = load(args.model, args.size, model_kwargs=args.model_kwargs)
    batch_size = min(args.batch_size, len(files))
    loaded.try_image(torch.zeros(loaded.input_size))
    names = loaded.class_names(names)
    topk = min(args.topk, len(names))
    network, prepare = loaded.model.to(device), preparation(loaded.config)
    rows: list[Prediction] = []
    with tqdm(total=len(files), unit="image", file=sys.stderr) as progress:
        for start in range(0, len(files), batch_size):
            chunk = files[start : start + batch_size]
            images = dict(_read(chunk, prepare))
            if images:
                rows += _rows(network, torch.stack(list(images.values())).to(device), list(images), names, topk)
            progress.update(len(chunk))
    done = len({row.file for row in rows})
    if not done:
        raise InputError(f"none of the {len(files)} images can be read, such as {files[0]!r}: name others")
    text = _as_json(rows) if args.format == "json" else _as_csv(rows)
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_file(args.out, text.encode())
    if names == [str(index) for index in range(len(names))]:
        print("predict: the classes have no names, only numbers; --class-map FILE gives names", file=sys.stderr)
    return 0 if done == len(files) else 1


def _files(path: str) -> list[str]:
    """The pictures in a folder; or the file, which may be missing: that is an error of this file only."""
    found = find_pictures(path) if os.path.isdir(path) else [path]
    if not found:
        raise InputError(f"there are no pictures ({' '.join(ENDINGS)}) in the folder {path!r}: name another folder")
    return found


def _read(files: list[str], prepare) -> Iterator[tuple[str, torch.Tensor]]:
    """The files that can be read, and their images [C, H, W]; the others are reported on stderr."""
    for file in files:
        try:
            yield file, prepare(open_rgb(file))
        except PictureError as error:  # noqa: PERF203
            tqdm.write(one_line(f"predict: left out: {error}"), file=sys.stderr)


@torch.inference_mode()
def _rows(model: nn.Module, batch: torch.Tensor, files: list[str], names: list[str], topk: int) -> list[Prediction]:
    """The most probable `topk` classes of images [B, C, H, W]."""
    probabilities, indices = model(batch).float().softmax(1).cpu().topk(topk)  # [B, topk] each
    return [
        Prediction(file.encode(errors="backslashreplace").decode(), rank, index, names[index], probability)
        for file, best, values in zip(files, indices.tolist(), probabilities.tolist(), strict=True)
        for rank, (index, probability) in enumerate(zip(best, values, strict=True), start=1)
    ]


def _as_json(rows: list[Prediction]) -> str:
    """A list of objects, one for each image."""
    images: dict[str, list[dict]] = {}
    for row in rows:
        entry = asdict(row)
        images.setdefault(entry.pop("file"), []).append(entry)
    return json.dumps([{"file": file, "classes": classes} for file, classes in images.items()], indent=1) + "\n"


def _as_csv(rows: list[Prediction]) -> str:
    """A line for each class of each image."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Prediction)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "probability": f"{row.probability:.6f}"} for row in rows)
    return text.getvalue()
