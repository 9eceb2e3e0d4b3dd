"""The command `rotate-eval`: accuracy of models against the rotation angle of the images; measures and stores.

The images are prepared as timm's `validate.py` prepares them (resize, crop, normalise), then rotated. The unrotated
image under the same treatment of the corners is the reference:

    top1, top5   the true class is the first, is among the first five
    agreement    the first class is that of the reference
    drift        |z - z_0| / |z_0|, z the logits minus their mean, which the softmax ignores, z_0 those of the reference

`--by-stage` adds `equivision_timm.testing.angle_error` of the feature maps. `rotate_results.py` stores the results
under their settings, `rotate_report.py` makes tables and pictures of them.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import equivision_timm
from equivision_timm.cli.models import Loaded, check_spec, class_titles, find_device, load
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options, integer
from equivision_timm.cli.rotate_results import Result, Results, Settings
from equivision_timm.data import ImageFolder, PictureError, preparation
from equivision_timm.errors import InputError, one_line
from equivision_timm.files import check_writable, file_sha256
from equivision_timm.models.tensor_hash import hash_tensors
from equivision_timm.rotation import inscribed_circle, rotate
from equivision_timm.testing import angle_error

__all__ = ["averaged", "measure", "register", "shown"]


def register(commands: Parsers) -> None:
    text = "measure accuracy against the rotation angle, for any timm models"
    more = """Top-1, top-5, agreement with the unrotated prediction and relative change of the logits (drift) at
        every angle; writes results.json, results.csv, rotation.png and report.html. The same command continues
        an interrupted one."""
    state = "everything measured is in {out}, the same command continues from there"
    parser = add_command(commands, "rotate-eval", run, state, text, more)
    add = parser.add_argument
    add_model(parser, several=True)
    add("--data", required=True, metavar="DIR", help="folder with one sub-folder of images per class")
    add("--out", type=Path, default=Path("rotate_eval"), metavar="DIR", help="folder to write (default: %(default)s)")
    sizes = "sides of the images in pixels (default: as trained, or the model's)"
    add("--size", dest="sizes", type=integer(1, 8192), nargs="+", metavar="N", help=sizes)
    add("--corners", choices=("reflect", "circle"), default="reflect", help="reflect them, or show a circle only")
    add("--split", default="validation", help="sub-folder of DIR to look for (default: %(default)s)")
    add("--class-map", default="", metavar="FILE", help="sub-folders in the order of the model's classes")
    add("--unlabelled", action="store_true", help="the folders are not classes: measure agreement and drift only")
    add_options(parser, "num-classes", "angles", "batch-size", "device", angles="0:360:15", batch_size=256)
    workers = integer(0, 8 * (os.cpu_count() or 1))
    add("-j", "--workers", type=workers, default=4, metavar="N", help="processes that load images (default: 4)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="its type (default: %(default)s)")
    add("--channels-last", action="store_true", help="memory format")
    add("--reparam", action="store_true", help="fold convolutions and norms first")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--by-stage", action="store_true", help="also measure how equivariant the maps of stages are")
    turns = "average the logits over N rotations, 1, 2 or 4"
    either.add_argument("--test-time-turns", type=int, choices=(1, 2, 4), default=1, metavar="N", help=turns)


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

    for spec in args.models:
        check_spec(spec)
    for name in ("results.json", *rotate_report.FILES, *rotate_report.STAGE_FILES):
        check_writable(args.out / name, make_folders=True)
    folder = _open_folder(args)
    device = find_device(args.device)
    precision = args.amp_dtype if args.amp else "float32"
    images, targets = _hash_folder(folder), "" if args.unlabelled else _hash([target for _, target in folder.samples])
    data = Path(os.path.abspath(args.data)).name
    common = Settings(data, images, targets, len(folder), args.angles, args.corners, precision, args.by_stage)
    results = Results(args.out / "results.json")
    work = list(itertools.product(dict.fromkeys(args.models), dict.fromkeys(args.sizes or [None])))

    def prepare(spec: str, size: int | None) -> tuple[Loaded, Settings]:
        loaded = load(spec, size, args.num_classes, args.model_kwargs, test_size=True)
        return loaded, _settings(loaded, common, args.test_time_turns)

    for spec, size in work:  # errors come before the work
        loaded, settings = prepare(spec, size)
        if not args.unlabelled:
            _check_classes(loaded, folder, args.class_map)
        loaded.try_image(torch.zeros(loaded.input_size))
        results.find(settings)
    measured, samples = [], rotate_report.Samples(folder, args.angles)
    try:
        for spec, size in work:
            loaded, settings = prepare(spec, size)
            _continue(results, settings, loaded, folder, device, args, samples)
    finally:
        measured = [result for result in results.read() if result.images]
        if measured:
            with results.locked():
                rotate_report.write(measured, args.out, samples)
    if not measured:
        raise InputError(
            f"none of the {len(folder)} images in {args.data!r} can be read, such as {folder.filename(0)!r}"
        )
    print(one_line(f"{args.out}/report.html"))
    return 0


def _settings(loaded: Loaded, common: Settings, turns: int) -> Settings:
    _, height, width = loaded.input_size
    if height != width:
        raise InputError(
            f"{loaded.spec!r} was trained on {height} x {width} pixels, rotations need squares: give --size N"
        )
    weights, options = hash_tensors(loaded.model.state_dict()), loaded.options
    own = {"model": loaded.spec, "size": width, "turns": turns, "weights": weights, "options": options}
    return replace(common, **own, preparation=loaded.config, classes=loaded.num_classes)


def _open_folder(args: argparse.Namespace) -> _Folder:
    folder = _Folder(args.data, args.split, args.class_map)
    found = folder.root.rstrip(os.sep) != args.data.rstrip(os.sep) or Path(args.data, args.split).is_dir()
    if not found and args.split != "validation":  # the default may be missing
        raise InputError(f"{args.data!r} has no sub-folder {args.split!r}: name another --split, or leave it out")
    if not args.unlabelled and not any(folder.class_to_idx):
        raise InputError(
            f"the images of {args.data!r} are not in class folders: put them into one sub-folder per class, "
            "or pass --unlabelled to measure agreement and drift only"
        )
    return folder


def _hash_folder(folder: _Folder) -> str:
    """SHA-256 of the names and contents of all files."""
    digests = []
    for index in tqdm(range(len(folder)), desc="reading", unit="image", leave=False, delay=5):
        content = ""  # of a file that cannot be read
        with contextlib.suppress(OSError):
            content = file_sha256(folder.filename(index, absolute=True))
        digests.append((folder.filename(index).encode(errors="surrogateescape").hex(), content))
    return _hash(digests)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _check_classes(loaded: Loaded, folder: _Folder, class_map: str) -> None:
    classes, found = loaded.num_classes, [name for name in folder.class_to_idx if name]
    if class_map:
        wrong = [t for t in folder.class_to_idx.values() if not isinstance(t, int) or not 0 <= t < classes]
        if wrong:
            raise InputError(
                f"--class-map {class_map!r} gives class {wrong[0]!r}, and {loaded.spec!r} has the classes 0 to "
                f"{classes - 1}: list the sub-folders in the order of the model's classes"
            )
    elif classes != len(found):
        raise InputError(
            f"{loaded.spec!r} has {classes} classes, the folder {len(found)}: give --class-map FILE (sub-folders in "
            "the order of the model's classes), or --unlabelled for agreement and drift only"
        )


def _continue(
    results: Results,
    settings: Settings,
    loaded: Loaded,
    folder: _Folder,
    device: torch.device,
    args: argparse.Namespace,
    samples: Any,
) -> None:
    """Continue the result under these settings to the end of the folder; it is stored after every batch.

    Then classify the `samples`, a `rotate_report.Samples`.
    """
    model = reparameterize_model(loaded.model) if args.reparam else loaded.model
    model = model.to(device)
    model = model.to(memory_format=torch.channels_last) if args.channels_last else model
    folder.transform = preparation(loaded.config)
    libraries = f"equivision_timm {equivision_timm.__version__}, timm {timm.__version__}, torch {torch.__version__}"
    versions = f"{libraries}; {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    origin = {"command": _typed(args.typed), "versions": versions, "date": date.today().isoformat()}
    result = replace(results.find(settings), **origin)
    rest = Subset(folder, range(result.position, len(folder)))
    batches = DataLoader(rest, args.batch_size, num_workers=args.workers, collate_fn=list)
    autocast = torch.autocast(device.type, dtype=getattr(torch, settings.precision), enabled=args.amp)
    label = f"{settings.model} {settings.size}px"
    with tqdm(total=len(folder), initial=result.position, unit="image", desc=label) as bar, autocast:
        for after in measure(result, model, batches, device):
            result = after
            if result.images:
                results.put(result)
            bar.update(result.position - bar.n)
        _classify_samples(samples, settings, model, loaded, folder, device)
    if result.unreadable:
        listed = ", ".join(map(one_line, result.unreadable[:5])) + (", ..." if len(result.unreadable) > 5 else "")
        tqdm.write(f"left out {len(result.unreadable)} unreadable image(s): {listed}")


@torch.inference_mode()
def _classify_samples(
    samples: Any,
    settings: Settings,
    model: nn.Module,
    loaded: Loaded,
    folder: _Folder,
    device: torch.device,
) -> None:
    """Add the predictions of a model to the samples, of which some may be left."""
    if not samples.pictures:
        return
    names = loaded.class_names()
    if settings.targets and names == [str(index) for index in range(len(names))]:  # unknown: those of the sub-folders
        names = [{i: name for name, i in folder.class_to_idx.items()}.get(index, "") for index in range(len(names))]
    images = torch.stack([folder.transform(picture) for picture in samples.pictures]).to(device)  # type: ignore[misc]
    predict, titles = averaged(model, settings.turns), class_titles(names)
    indices = [predict(shown(images, angle, settings.corners)).argmax(1).tolist() for angle in samples.angles]
    samples.add(settings.cell, titles, indices, bool(settings.targets))


def _typed(words: list[str]) -> str:
    """The command for the report, without the user's folders: of absolute paths the last part."""
    return shlex.join(re.sub(r"(^|[=:])([A-Za-z]:)?[\\/].*[\\/](?=[^\\/])", r"\1", word) for word in words)


def measure(result: Result, model: nn.Module, batches: DataLoader[Any], device: torch.device) -> Iterator[Result]:
    """Continue a result; yields it anew after every batch.

    Args:
        result: what was measured so far; its settings say how.
        model: images [B, C, H, W] -> logits [B, classes], in eval mode, on `device`.
        batches: the remaining images, lists of (image [C, H, W], target) and of names of unreadable files.
        device: where to compute.
    """
    settings, predict = result.settings, averaged(model, result.settings.turns)
    for batch in batches:
        good = [sample for sample in batch if not isinstance(sample, str)]
        sums, stages = {}, {}
        if good:
            images = torch.stack([image for image, _ in good]).to(device)
            targets = torch.tensor([target for _, target in good], device=device) if settings.targets else None
            sums = _sums(predict, images, targets, settings)
            stages = _stages(model, images, settings) if settings.by_stage else {}
        result = result.add(len(good), [sample for sample in batch if isinstance(sample, str)], sums, stages)
        yield result


def averaged(model: nn.Module, turns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """images -> the mean of the logits over `turns` rotations of each, 360 / turns degrees apart."""
    if turns == 1:
        return model

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(rotate(images, 360 / turns * k)) for k in range(turns)]).mean(0)

    return predict


def shown(images: torch.Tensor, angle: float, corners: str) -> torch.Tensor:
    """Images [B, C, H, W] rotated, with corners as in `Settings`; zero is the mean colour after normalisation."""
    rotated = rotate(images, angle)
    return rotated * inscribed_circle(rotated) if corners == "circle" else rotated


def _stages(model: nn.Module, images: torch.Tensor, settings: Settings) -> dict[str, list[float]]:
    """The sums of the errors of every stage over one batch, by angle."""
    errors = angle_error(model, images, settings.angles)
    return {stage: [len(images) * value for value in by_angle.values()] for stage, by_angle in errors.items()}


@torch.inference_mode()
def _sums(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    targets: torch.Tensor | None,
    settings: Settings,
) -> dict[str, list[float]]:
    """The sums of all metrics over one batch, by angle."""
    reference = predict(shown(images, 0, settings.corners)).float()
    sums: dict[str, list[float]] = {}
    for angle in settings.angles:
        logits = predict(shown(images, angle, settings.corners)).float() if angle % 360 else reference
        for name, value in _compare(logits, reference, targets).items():
            sums.setdefault(name, []).append(value)
    return sums


def _compare(logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor | None) -> dict[str, float]:
    """The sums of all metrics over one batch of logits [B, classes]."""
    first = logits.argmax(1)
    centred, centred_reference = (z - z.mean(1, keepdim=True) for z in (logits, reference))
    length = centred_reference.norm(dim=1).clamp_min(torch.finfo(reference.dtype).tiny)  # zero with a single class
    drift = (centred - centred_reference).norm(dim=1) / length
    sums = {"agreement": (first == reference.argmax(1)).sum().item(), "drift": drift.sum().item()}
    if targets is not None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        sums["top1"] = (first == targets).sum().item()
        sums["top5"] = (best == targets[:, None]).any(1).sum().item()
    return sums
