"""The command `rotate-eval`: accuracy of models against the rotation angle of the images; measures and stores.

The images are prepared as by timm's `validate.py`, then rotated. The reference is the unrotated image, its corners
treated alike:

    top1, top5   the true class is the first, is among the first five
    agreement    the first class is that of the reference
    drift        |z - z_0| / |z_0|, z the logits minus their mean, which the softmax ignores, z_0 those of the reference

`--by-stage` adds `equivision_timm.testing.angle_error` of the feature maps.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from equivision_timm.cli.models import Loaded, load
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options, libraries, positive
from equivision_timm.data import ImageFolder, PictureError, preparation
from equivision_timm.errors import InputError, one_line
from equivision_timm.files import check_writable, file_sha256, write_file
from equivision_timm.models.pretrained import hash_tensors
from equivision_timm.rotation import inscribed_circle, rotate
from equivision_timm.testing import angle_error

__all__ = ["METRICS", "Result", "Settings", "averaged", "find_result", "measure", "read_results", "register", "shown"]

METRICS = ("top1", "top5", "agreement", "drift")
# In these settings the results of one file, hence of one picture, agree
_SHARED = ("data", "images", "labelled", "files", "angles", "corners", "precision", "by_stage")

Predict: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # images [B, C, H, W] -> logits [B, classes]


def register(commands: Parsers) -> None:
    text = "measure accuracy against the rotation angle, for any timm models"
    more = """Top-1, top-5, agreement with the unrotated prediction and relative change of the logits (drift) at
        every angle; prints their means and worst values and writes results.json, results.csv and rotation.png.
        The same command continues an interrupted one."""
    parser = add_command(commands, "rotate-eval", run, text, more)
    add = parser.add_argument
    add_model(parser, several=True)
    add("--data", required=True, metavar="DIR", help="folder with one sub-folder of images per class")
    add("--out", type=Path, default=Path("rotate_eval"), metavar="DIR", help="folder to write (default: %(default)s)")
    sizes = "sides of the images in pixels (default: as trained, or the model's)"
    add("--size", dest="sizes", type=positive, nargs="+", metavar="N", help=sizes)
    add("--corners", choices=("reflect", "circle"), default="reflect", help="reflect them, or show a circle only")
    add("--split", default="validation", help="sub-folder of DIR to look for (default: %(default)s)")
    add("--class-map", default="", metavar="FILE", help="sub-folders in the order of the model's classes")
    add("--unlabelled", action="store_true", help="the folders are not classes: measure agreement and drift only")
    add_options(parser, "num-classes", "angles", "batch-size", "device", angles="0:360:15", batch_size=256)
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images (default: 4)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="its type (default: %(default)s)")
    add("--channels-last", action="store_true", help="memory format")
    add("--reparam", action="store_true", help="fold convolutions and norms first")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--by-stage", action="store_true", help="also measure how equivariant the maps of stages are")
    turns = "average the logits over N rotations, 1, 2 or 4"
    either.add_argument("--test-time-turns", type=int, choices=(1, 2, 4), default=1, metavar="N", help=turns)


# Results, and what they depend on


@dataclass(frozen=True)
class Settings:
    """Everything that the figures of a result depend on, as JSON has it: the key under which it is stored."""

    data: str  # name of the folder of images
    images: str  # SHA-256 of the names, contents and classes of its files
    labelled: bool  # whether the classes count
    files: int  # number of files
    angles: list[float]  # in degrees, counter-clockwise
    corners: str  # 'reflect': continued by its reflection; 'circle': only the inscribed circle, on the mean colour
    precision: str  # 'float32', or the type of mixed precision
    by_stage: bool  # whether the feature maps of each stage are measured
    model: str = ""  # its spec
    size: int = 0  # side of the images in pixels
    turns: int = 1  # the logits are averaged over so many rotations of each image, 360 / turns degrees apart
    weights: str = ""  # SHA-256 of the model's tensors
    options: dict[str, Any] = field(default_factory=dict)  # keywords with which the model was created
    preparation: dict[str, Any] = field(default_factory=dict)  # timm's data config: mean, std, crop, interpolation
    classes: int = 0  # number of classes of the model

    @property
    def cell(self) -> tuple[str, int, int]:
        """Model, size and turns: a file holds one result of each."""
        return self.model, self.size, self.turns


@dataclass(frozen=True)
class Result:
    """Sums over the images measured so far under some settings."""

    settings: Settings
    position: int = 0  # number of files taken
    images: int = 0  # number of images measured
    unreadable: list[str] = field(default_factory=list)  # names of the other files
    # by name, then by angle: of each of `METRICS` (without labels no top1 and top5), and of the error of each stage
    sums: dict[str, list[float]] = field(default_factory=dict)
    versions: str = ""  # of the libraries, and the device
    date: str = ""  # of the last run

    def mean(self, name: str) -> list[float]:
        """The mean over the images of a metric (in per cent, except the drift) or of a stage's error, by angle."""
        scale = 100.0 if name in METRICS and name != "drift" else 1.0
        return [scale * value / self.images for value in self.sums[name]]

    def add(self, images: int, unreadable: list[str], sums: dict[str, list[float]]) -> "Result":
        """The result after one more batch; `sums` is empty if it has no images."""
        position, images = self.position + images + len(unreadable), self.images + images
        if self.sums and sums:
            sums = {name: [a + b for a, b in zip(self.sums[name], sums[name], strict=True)] for name in sums}
        unreadable = [*self.unreadable, *unreadable]
        return replace(self, position=position, images=images, unreadable=unreadable, sums=sums or self.sums)


def read_results(path: Path) -> list[Result]:
    """The results in a JSON file, none if it does not exist. Raises InputError if it holds something else."""
    try:
        entries = json.loads(path.read_bytes())["results"]
        return [Result(**{**entry, "settings": Settings(**entry["settings"])}) for entry in entries]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of this rotate-eval ({error}): choose another --out") from error


def find_result(stored: list[Result], settings: Settings, out: Path) -> Result:
    """The result under these settings, or an empty one. Raises InputError if one of those stored does not belong."""
    here = asdict(settings)
    for other in stored:
        there = asdict(other.settings)
        names = here if other.settings.cell == settings.cell else _SHARED
        names = [name for name in names if there[name] != here[name]]
        differ = [f"{name}: {there[name]!s:.60} there, {here[name]!s:.60} here" for name in names]
        if differ:
            raise InputError(f"{out} was measured with other settings ({'; '.join(differ)}): choose another --out")
    return next((other for other in stored if other.settings == settings), Result(settings))


# The run


class _Folder(ImageFolder):
    """Images prepared for a model; an unreadable one is returned as its name."""

    def __getitem__(self, index: int) -> Any:
        try:
            return self.transform(self.picture(index)), self.samples[index][1]  # type: ignore[misc]
        except PictureError:
            return self.filename(index)


def run(args: argparse.Namespace) -> int:
    """Measure all models at all sizes and write the report; returns the exit status."""
    from equivision_timm.cli import rotate_report  # matplotlib

    file = args.out / "results.json"
    for name in (file.name, *rotate_report.FILES):
        check_writable(args.out / name)
    # The default may be missing; a split that was named may not
    root = args.data if args.split == "validation" else os.path.join(args.data, args.split)
    folder = _Folder(root, args.split, args.class_map)
    common, work = _common_settings(args, folder), []
    for spec, size in itertools.product(dict.fromkeys(args.models), dict.fromkeys(args.sizes or [None])):
        loaded = load(spec, size, args.num_classes, args.model_kwargs, test_size=True)
        if common.labelled:
            _check_classes(loaded, folder, args.class_map)
        work.append(
            (loaded, find_result(read_results(file), _settings(loaded, common, args.test_time_turns), args.out))
        )
    samples = rotate_report.Samples(folder, args.angles)
    try:
        while work:
            loaded, result = work.pop(0)
            for after in _measured(result, loaded, folder, args, samples):
                stored = read_results(file)
                find_result(stored, after.settings, args.out)  # another run may have written since
                stored = [*(other for other in stored if other.settings.cell != after.settings.cell), after]
                write_file(file, json.dumps({"results": [asdict(other) for other in stored]}, indent=1).encode())
    finally:
        if stored := read_results(file):
            print(rotate_report.write(stored, args.out, samples))
    return 0 if stored else 1  # no image can be read


def _common_settings(args: argparse.Namespace, folder: _Folder) -> Settings:
    """The settings in which all models of a run agree."""
    digest = hashlib.sha256()
    for path, target in tqdm(folder.samples, desc="reading", unit="image", leave=False, delay=5):
        digest.update(f"{os.path.relpath(path, folder.root)!a} {not args.unlabelled and target} ".encode())
        with contextlib.suppress(OSError):  # a file that cannot be read
            digest.update(file_sha256(path).encode())
    precision, data = args.amp_dtype if args.amp else "float32", Path(os.path.abspath(args.data)).name
    common = data, digest.hexdigest(), not args.unlabelled, len(folder), args.angles, args.corners
    return Settings(*common, precision, args.by_stage)


def _settings(loaded: Loaded, common: Settings, turns: int) -> Settings:
    _, height, width = loaded.input_size
    if height != width:
        raise InputError(
            f"{loaded.spec!r} was trained on {height} x {width} pixels, rotations need squares: give --size N"
        )
    weights = hash_tensors(loaded.model.state_dict())
    given = json.loads(json.dumps({"options": loaded.options, "preparation": loaded.config}, default=str))
    own = {"model": loaded.spec, "size": width, "turns": turns, "weights": weights, "classes": loaded.num_classes}
    return replace(common, **own, **given)


def _check_classes(loaded: Loaded, folder: _Folder, class_map: str) -> None:
    """Raise InputError if the classes of the folder are not those of the model."""
    classes, numbers = loaded.num_classes, folder.class_to_idx
    wrong = [t for t in numbers.values() if not isinstance(t, int) or not 0 <= t < classes]
    if class_map and wrong:
        fault = f"--class-map {class_map!r} gives class {wrong[0]!r}, {loaded.spec!r} has classes 0 to {classes - 1}"
    elif not class_map and classes != sum(map(bool, numbers)):
        fault = f"{loaded.spec!r} has {classes} classes, the folder {sum(map(bool, numbers))} sub-folders"
    else:
        return
    remedy = "give --class-map FILE, the sub-folders in the order of the model's classes, or --unlabelled"
    raise InputError(f"{fault}: {remedy} for agreement and drift only")


def _measured(
    result: Result, loaded: Loaded, folder: _Folder, args: argparse.Namespace, samples: Any
) -> Iterator[Result]:
    """The result after each batch to the end of the folder; then the `rotate_report.Samples` are classified."""
    device, settings = args.device, result.settings
    model = (reparameterize_model(loaded.model) if args.reparam else loaded.model).to(device)
    model = model.to(memory_format=torch.channels_last) if args.channels_last else model
    folder.transform = preparation(loaded.config)
    versions = f"{libraries()}; {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    result = replace(result, versions=versions, date=date.today().isoformat())
    rest = Subset(folder, range(result.position, len(folder)))
    batches = DataLoader(rest, args.batch_size, num_workers=args.workers, collate_fn=list)
    autocast = torch.autocast(device.type, dtype=getattr(torch, settings.precision), enabled=args.amp)
    label = f"{settings.model} {settings.size}px"
    with tqdm(total=len(folder), initial=result.position, unit="image", desc=label) as bar, autocast:
        for after in measure(result, model, batches, device):
            result = after
            if result.images:
                yield result
            bar.update(result.position - bar.n)
        samples.classify(settings, averaged(model, settings.turns), loaded, folder, device)
    if result.unreadable:
        tqdm.write(f"left out {len(result.unreadable)} unreadable image(s): {one_line(', '.join(result.unreadable))}")


def measure(result: Result, model: nn.Module, batches: DataLoader[Any], device: torch.device) -> Iterator[Result]:
    """Continue a result with a model in eval mode on `device`; yields it anew after every batch.

    `batches` are lists of images with targets, ([C, H, W], int), and of names of unreadable files.
    """
    settings = result.settings
    predict = averaged(model, settings.turns)
    for batch in batches:
        unreadable = [sample for sample in batch if isinstance(sample, str)]
        good = [sample for sample in batch if not isinstance(sample, str)]
        sums: dict[str, list[float]] = {}
        if good:
            images = torch.stack([image for image, _ in good]).to(device)
            targets = torch.tensor([target for _, target in good], device=device) if settings.labelled else None
            sums = _sums(predict, images, targets, settings)
            if settings.by_stage:
                errors = angle_error(model, images, settings.angles)
                sums |= {stage: [len(good) * value for value in by.values()] for stage, by in errors.items()}
        result = result.add(len(good), unreadable, sums)
        yield result


def averaged(model: nn.Module, turns: int) -> Predict:
    """images -> the mean of the logits over `turns` rotations of each, 360 / turns degrees apart."""
    if turns == 1:
        return model
    return lambda images: torch.stack([model(rotate(images, 360 / turns * k)) for k in range(turns)]).mean(0)


def shown(images: torch.Tensor, angle: float, corners: str) -> torch.Tensor:
    """Images [B, C, H, W] rotated, with corners as in `Settings`; zero is the mean colour after normalisation."""
    rotated = rotate(images, angle)
    return rotated * inscribed_circle(rotated) if corners == "circle" else rotated


@torch.inference_mode()
def _sums(
    predict: Predict, images: torch.Tensor, targets: torch.Tensor | None, settings: Settings
) -> dict[str, list[float]]:
    """The sums of all metrics over one batch, by angle."""
    sums: dict[str, list[float]] = defaultdict(list)
    reference = predict(shown(images, 0, settings.corners)).float()  # [B, classes]
    centred_reference = reference - reference.mean(1, keepdim=True)
    length = centred_reference.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # zero with a single class
    for angle in settings.angles:
        logits = predict(shown(images, angle, settings.corners)).float() if angle % 360 else reference
        first = logits.argmax(1)
        if targets is not None:
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
            sums["top1"].append((first == targets).sum().item())
            sums["top5"].append((best == targets[:, None]).any(1).sum().item())
        sums["agreement"].append((first == reference.argmax(1)).sum().item())
        centred = logits - logits.mean(1, keepdim=True)
        sums["drift"].append(((centred - centred_reference).norm(dim=1) / length).sum().item())
    return dict(sums)
