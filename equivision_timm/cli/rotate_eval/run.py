"""rotate-eval from the models' names to the report: what `python -m equivision_timm rotate-eval` calls."""

import contextlib
import hashlib
import os
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.utils import reparameterize_model
from tqdm import tqdm

import equivision_timm
from equivision_timm.arguments import InputError, check_number, one_line
from equivision_timm.cli.loading import check_model_name
from equivision_timm.cli.rotate_eval.measure import CORNERS, TURNS, Folder, measure
from equivision_timm.cli.rotate_eval.pictures import draw_samples
from equivision_timm.cli.rotate_eval.report import FILES, STAGE_FILES, write_report
from equivision_timm.cli.rotate_eval.results import Cell, Results
from equivision_timm.cli.trained import load_trained
from equivision_timm.cli.trial import MOST_CLASSES, MOST_PIXELS, check_memory, explained, find_device, try_model
from equivision_timm.files import check_writable
from equivision_timm.images.pictures import PictureError
from equivision_timm.models.attributes import attribute
from equivision_timm.models.tensor_hash import hash_tensors

__all__ = ["rotate_eval"]

_LESS_MEMORY = (
    "lower --batch-size (or --size, or --workers); what was measured is kept, the same command goes on from there"
)


def rotate_eval(
    models: list[str],
    data: str,
    angles: list[float],
    out: str = "rotate_eval",
    sizes: list[int] | None = None,
    corners: str = "reflect",
    split: str = "validation",
    class_map: str = "",
    unlabelled: bool = False,
    num_classes: int | None = None,
    batch_size: int = 256,
    workers: int = 4,
    device: str | None = None,
    amp: bool = False,
    amp_dtype: str = "float16",
    channels_last: bool = False,
    reparam: bool = False,
    by_stage: bool = False,
    test_time_turns: int = 1,
    command: str = "",
) -> None:
    """Measure models on images turned by every angle; writes results.json, results.csv, rotation.png, report.html.

    Results are kept after every batch: the same call goes on where an interrupted one stopped, and a call with other
    models or sizes adds to what is there.

    Args:
        models: `NAME` (pretrained weights) or `NAME=CHECKPOINT`.
        data: folder of images, one sub-folder per class.
        angles: in degrees, counter-clockwise.
        out: folder to write.
        sizes: sides of the images in pixels; that of the checkpoint's training, or the size each model is validated
            at, where None.
        corners: 'reflect' or 'circle', see `measure`.
        split: sub-folder of `data` to look for.
        class_map: file that maps sub-folders to class indices.
        unlabelled: measure agreement and drift alone, on images whose classes are not those of the model.
        num_classes: classes of the models; those that a checkpoint shows, or their own, where None.
        batch_size: images at a time.
        workers: processes that load images.
        device: where to compute; the GPU where None and there is one.
        amp: mixed precision.
        amp_dtype: its type, 'float16' or 'bfloat16'.
        channels_last: memory format.
        reparam: fold convolutions and norms first.
        by_stage: measure the maps of every stage, too, see `equivision_timm.testing.angle_error`; also writes
            stages.csv and stages.png.
        test_time_turns: average the logits over 1, 2 or 4 rotations of each image; one `out` may hold models measured
            with and without.
        command: what the user typed, for the report.

    Raises:
        InputError: something given cannot be used, or there is too little memory; nothing measured is lost.
        KeyboardInterrupt: after writing the report on what was measured.
    """
    models, sizes = list(dict.fromkeys(models)), list(dict.fromkeys(sizes or []))
    _check_ways(by_stage, test_time_turns)
    folder = _check_input(models, data, out, sizes, split, class_map, unlabelled, num_classes, batch_size, workers)
    batch_size = min(batch_size, len(folder))
    if by_stage:
        for file in STAGE_FILES:
            check_writable(Path(out, file), make_folders=True)
    settings = _settings(folder, data, angles, corners, unlabelled, amp_dtype if amp else "float32", by_stage)
    results = Results(Path(out, "results.json"), settings)
    target = find_device(device)
    origin = {"command": command, "versions": _versions(target), "date": date.today().isoformat()}
    weights: dict[str, str] = {}  # of each model their hash

    def load(name: str) -> tuple[nn.Module, list[dict]]:
        """The model where it computes, and its data config at every size."""
        model, training = load_trained(name, num_classes)
        _check_classes(name, model, folder, unlabelled, class_map)
        if by_stage and not (hasattr(model, "forward_intermediates") and hasattr(model, "feature_info")):
            raise InputError(f"{name!r} shows no maps of its stages: leave --by-stage out, or measure it alone")
        config = resolve_data_config(training, model=model, use_test_size=True)
        channels, own = config["input_size"][0], config["input_size"][-1]
        weights[name] = hash_tensors(model.state_dict())
        model = reparameterize_model(model) if reparam else model
        model = model.to(target)
        model = model.to(memory_format=torch.channels_last) if channels_last else model
        return model, [{**config, "input_size": (channels, size, size)} for size in sizes or [own]]

    def computing(name: str, images: int, size: int) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(explained(name, images, size, target, _LESS_MEMORY))
        if amp:
            stack.enter_context(torch.autocast(target.type, dtype=getattr(torch, amp_dtype)))
        return stack

    for name in models:
        model, configs = load(name)
        for config in configs:
            size = config["input_size"][-1]
            check_memory("--batch-size or --size", batch_size, size)
            results.cell(name, size, test_time_turns, weights[name])  # refuses other weights before the work
            with computing(name, 1, size):
                try_model(name, model, lambda config=config: folder.prepare_for(config).sample(), size, target)
    try:
        for name in models:
            model, configs = load(name)
            for config in configs:
                size = config["input_size"][-1]
                folder.prepare_for(config)
                cell = replace(results.cell(name, size, test_time_turns, weights[name]), **origin)
                with computing(name, batch_size, size):
                    progress = measure(
                        cell, model, folder, angles, corners, not unlabelled, by_stage, batch_size, workers, target
                    )
                    _follow(progress, results, cell, len(folder))
    finally:
        if results.measured():
            with results.locked():
                write_report(results, Path(out), draw_samples(folder, angles, corners))
    if not results.measured():
        raise InputError(f"none of the {len(folder)} images in {data!r} can be read, such as {_first_fault(folder)}")


def _versions(device: torch.device) -> str:
    """What the figures may depend on."""
    versions = {"equivision_timm": equivision_timm.__version__, "timm": timm.__version__, "torch": torch.__version__}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{', '.join(' '.join(pair) for pair in versions.items())}; {name}"


def _check_ways(by_stage: bool, test_time_turns: int) -> None:
    if test_time_turns not in TURNS:
        raise InputError(f"--test-time-turns {test_time_turns} does not exist: use one of {', '.join(map(str, TURNS))}")
    if by_stage and test_time_turns > 1:
        raise InputError(
            f"--by-stage measures maps, and --test-time-turns {test_time_turns} averages logits: leave one of them out"
        )


def _check_input(
    models: list[str],
    data: str,
    out: str,
    sizes: list[int],
    split: str,
    class_map: str,
    unlabelled: bool,
    num_classes: int | None,
    batch_size: int,
    workers: int,
) -> Folder:
    """What can be known before a model is loaded; the folder of images."""
    for size in sizes:
        check_number("--size", size, 1, MOST_PIXELS)
    check_number("--num-classes", num_classes, 1, MOST_CLASSES)
    check_number("--batch-size", batch_size, 1, sys.maxsize)
    check_number("--workers", workers, 0, 8 * (os.cpu_count() or 1))
    for name in models:
        check_model_name(name)
    for name in ("results.json", *FILES):
        check_writable(Path(out, name), make_folders=True)
    return _open_folder(data, split, class_map, unlabelled)


def _open_folder(data: str, split: str, class_map: str, unlabelled: bool) -> Folder:
    folder = Folder(data, split, class_map)
    if not unlabelled and not folder.classes:
        raise InputError(
            f"the images of {data!r} lie in no class folders: put them into one sub-folder per class, "
            "or pass --unlabelled to measure agreement and drift alone"
        )
    return folder


def _settings(
    folder: Folder, data: str, angles: list[float], corners: str, unlabelled: bool, precision: str, by_stage: bool
) -> dict:
    """What all cells of a results file share; the images by a hash of their names, so that the folder may move."""
    if corners not in CORNERS:
        raise InputError(f"unknown corners {corners!r}: use one of {', '.join(CORNERS)}")
    names = hashlib.sha256("\n".join(folder.names()).encode(errors="surrogateescape")).hexdigest()[:16]
    return {
        "data": Path(os.path.abspath(data)).name,
        "files": len(folder),
        "names": names,
        "angles": angles,
        "corners": corners,
        "labelled": not unlabelled,
        "precision": precision,
        "by_stage": by_stage,
    }


def _check_classes(name: str, model: nn.Module, folder: Folder, unlabelled: bool, class_map: str) -> None:
    if unlabelled:
        return
    classes = attribute(model, "num_classes", int)
    if class_map:
        odd = [t for t in folder.targets if not isinstance(t, int) or not 0 <= t < classes]
        if odd:
            raise InputError(
                f"--class-map {class_map!r} gives class {odd[0]!r}, and {name!r} has the classes 0 to "
                f"{classes - 1}: list the sub-folders in the order of the model's classes"
            )
        return
    if classes == len(folder.classes):
        return
    raise InputError(
        f"{name!r} tells {classes} classes apart, the folder holds {len(folder.classes)}: give --class-map "
        "FILE (sub-folders in the order of the model's classes), or --unlabelled for agreement and drift alone"
    )


def _follow(progress, results: Results, cell: Cell, files: int) -> None:
    """Keep every cell that `progress` yields, and show how far it is."""
    with tqdm(total=files, initial=cell.position, unit="image", desc=f"{cell.model} {cell.size}px") as bar:
        for cell in progress:
            if cell.images:
                results.put(cell)
            bar.update(cell.position - bar.n)
    if cell.unreadable:
        listed = ", ".join(map(one_line, cell.unreadable[:5])) + (", ..." if len(cell.unreadable) > 5 else "")
        tqdm.write(f"left out {len(cell.unreadable)} unreadable image(s): {listed}")


def _first_fault(folder: Folder) -> str:
    """Why the first picture cannot be read."""
    try:
        folder.picture(0)
    except PictureError as error:
        return str(error)
    return folder.names()[0]
