"""The command `predict`: the most probable classes of image files."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from equivision_timm.cli.models import load
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options, as_csv, positive
from equivision_timm.data import PictureError, find_pictures, open_rgb, preparation
from equivision_timm.errors import InputError, one_line
from equivision_timm.files import check_writable, write_file

__all__ = ["register"]


def register(commands: Parsers) -> None:
    text = "the most probable classes of image files"
    more = """Writes a row for each image and class: file; rank, 1 for the most probable class; index, the
        number of the class from 0, as in the outputs of the model; name, that of --class-map, of the weights or
        of ImageNet, else the index; probability, the softmax of the logits, which over all classes sums to 1.
        Checkpoints of timm's train.py determine number of classes, image size and normalisation. Files that
        cannot be read are reported and left out; the exit status is then 1."""
    parser = add_command(commands, "predict", run, text, more)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|DIR", help="files, or folders, searched at any depth")
    add_model(parser)
    add("--topk", type=positive, default=5, metavar="K", help="classes of each image, or all if there are fewer (5)")
    add("--format", choices=("csv", "json"), default="csv", help="format of the result (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="file to write (default: print)")
    add_options(parser, "class-map", "size", "batch-size", "device", batch_size=32)


def run(args: argparse.Namespace) -> int:
    """Write the classes of all images when all are computed; returns the exit status, 1 if a file was left out."""
    if args.out is not None:
        check_writable(args.out)
    files = list(dict.fromkeys(file for path in args.images for file in find_pictures(path) or [path]))
    if not any(os.path.isfile(file) for file in files):
        raise InputError(f"no picture in {' '.join(args.images)}: give files or folders of pictures")
    loaded = load(args.model, args.size, model_kwargs=args.model_kwargs)
    names, prepare = loaded.class_names(args.class_map), preparation(loaded.config)
    model = loaded.model.to(args.device)
    found: list[dict[str, Any]] = []
    with tqdm(total=len(files), unit="image", file=sys.stderr) as progress:
        for chunk in (files[start : start + args.batch_size] for start in range(0, len(files), args.batch_size)):
            if images := dict(_read(chunk, prepare)):
                found += _classify(model, images, args.device, names, args.topk)
            progress.update(len(chunk))
    if not found:
        return 1
    if args.format == "json":
        text = json.dumps(found, indent=1) + "\n"
    else:
        classes = [{"file": image["file"], **row} for image in found for row in image["classes"]]
        text = as_csv([{**row, "probability": f"{row['probability']:.6f}"} for row in classes])
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_file(args.out, text.encode())
    if names == [str(index) for index in range(len(names))]:
        print("predict: the classes have no names, only numbers; --class-map FILE gives names", file=sys.stderr)
    return 0 if len(found) == len(files) else 1


def _read(files: list[str], prepare: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The files that can be read, and their images [C, H, W]; the others are reported on stderr."""
    for file in files:
        try:
            yield file, prepare(open_rgb(file))
        except PictureError as error:  # noqa: PERF203
            tqdm.write(one_line(f"predict: left out: {error}"), file=sys.stderr)


@torch.inference_mode()
def _classify(
    model: nn.Module, images: dict[str, torch.Tensor], device: torch.device, names: list[str], topk: int
) -> list[dict[str, Any]]:
    """The most probable classes of each of the images {file: [C, H, W]}."""
    logits = model(torch.stack([*images.values()]).to(device))  # [B, classes]
    probabilities, indices = logits.float().softmax(1).cpu().topk(min(topk, len(names)))  # [B, topk] each
    found = []
    for file, best, values in zip(images, indices.tolist(), probabilities.tolist(), strict=True):
        ranks = enumerate(zip(best, values, strict=True), start=1)
        classes = [{"rank": k, "index": i, "name": names[i], "probability": value} for k, (i, value) in ranks]
        found.append({"file": file.encode(errors="backslashreplace").decode(), "classes": classes})
    return found
