"""rotate-eval from the models' names to the report: what `python -m equivision_timm rotate-eval` calls."""

import contextlib
import hashlib
from pathlib import Path

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.utils import reparameterize_model
from tqdm import tqdm

from equivision_timm.loading import InputError, check_model_name, load_model
from equivision_timm.rotate_eval.measure import CORNERS, Folder, measure
from equivision_timm.rotate_eval.report import write_report
from equivision_timm.rotate_eval.results import Cell, Results

__all__ = ["rotate_eval"]


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
) -> None:
    """Measure models on images turned by every angle; writes results.json, results.csv, rotation.png, report.html.

    Results are kept after every batch: the same call goes on where an interrupted one stopped, and a call with other
    models or sizes adds to what is there.

    Args:
        models: `NAME` (pretrained weights) or `NAME=CHECKPOINT`.
        data: folder of images, one sub-folder per class.
        angles: in degrees, counter-clockwise.
        out: folder to write.
        sizes: sides of the images in pixels; the size each model is validated at where None.
        corners: 'reflect' or 'circle', see `measure`.
        split: sub-folder of `data` to look for.
        class_map: file that maps sub-folders to class indices.
        unlabelled: measure agreement and drift alone, on images whose classes are not those of the model.
        num_classes: classes of the models, their own where None, or those of the folder with a checkpoint.
        batch_size: images at a time.
        workers: processes that load images.
        device: where to compute; the GPU where None and there is one.
        amp: mixed precision.
        amp_dtype: its type, 'float16' or 'bfloat16'.
        channels_last: memory format.
        reparam: fold convolutions and norms first.

    Raises:
        InputError: something given cannot be used, or there is too little memory; nothing measured is lost.
        KeyboardInterrupt: after writing the report on what was measured.
    """
    for name in models:
        check_model_name(name)
    folder = _open_folder(data, split, class_map, unlabelled)
    precision = amp_dtype if amp else "float32"
    Path(out).mkdir(parents=True, exist_ok=True)
    results = Results(Path(out, "results.json"), _settings(folder, data, angles, corners, unlabelled, precision))
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = contextlib.nullcontext()
    if amp:
        autocast = torch.autocast(target.type, dtype=getattr(torch, amp_dtype))
    try:
        for name in models:
            classes = num_classes or (len(folder.classes) if "=" in name and not unlabelled else None)
            model = load_model(name, classes)
            _check_classes(name, model, folder, unlabelled, class_map)
            model = reparameterize_model(model) if reparam else model
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            model = model.to(device=target, memory_format=memory_format)
            config = resolve_data_config({}, model=model, use_test_size=True)
            for size in sizes or [config["input_size"][-1]]:
                folder.prepare_for({**config, "input_size": (config["input_size"][0], size, size)})
                cell = results.cells.get((name, size), Cell(name, size))
                with autocast, _explained(name, size, batch_size, target):
                    progress = measure(
                        cell, model, folder, angles, corners, not unlabelled, batch_size, workers, target
                    )
                    _follow(progress, results, cell, len(folder))
    finally:
        if results.measured():
            write_report(results, Path(out))
    if not results.measured():
        raise InputError(f"none of the {len(folder)} images in {data!r} can be read")


def _open_folder(data: str, split: str, class_map: str, unlabelled: bool) -> Folder:
    folder = Folder(data, split, class_map)
    if not unlabelled and not folder.classes:
        raise InputError(
            f"the images of {data!r} lie in no class folders: put them into one sub-folder per class, "
            "or pass --unlabelled to measure agreement and drift alone"
        )
    return folder


def _settings(folder: Folder, data: str, angles: list[float], corners: str, unlabelled: bool, precision: str) -> dict:
    """What all cells of a results file share; the images by a hash of their names, so that the folder may move."""
    if corners not in CORNERS:
        raise InputError(f"unknown corners {corners!r}: use one of {', '.join(CORNERS)}")
    names = hashlib.sha256("\n".join(folder.names()).encode()).hexdigest()[:16]
    return {
        "data": Path(data).name,
        "files": len(folder),
        "names": names,
        "angles": angles,
        "corners": corners,
        "labelled": not unlabelled,
        "precision": precision,
    }


def _check_classes(name: str, model: nn.Module, folder: Folder, unlabelled: bool, class_map: str) -> None:
    if unlabelled or class_map or model.num_classes == len(folder.classes):
        return
    raise InputError(
        f"{name!r} tells {model.num_classes} classes apart, the folder holds {len(folder.classes)}: give --class-map "
        "FILE (sub-folders in the order of the model's classes), or --unlabelled for agreement and drift alone"
    )


def _follow(progress, results: Results, cell: Cell, files: int) -> None:
    """Keep every cell that `progress` yields, and show how far it is."""
    with tqdm(total=files, initial=cell.position, unit="image", desc=f"{cell.model} {cell.size}px") as bar:
        for cell in progress:
            results.put(cell)
            bar.update(cell.position - bar.n)
    if cell.unreadable:
        listed = ", ".join(cell.unreadable[:5]) + (", ..." if len(cell.unreadable) > 5 else "")
        tqdm.write(f"left out {len(cell.unreadable)} unreadable image(s): {listed}")


@contextlib.contextmanager
def _explained(name: str, size: int, batch_size: int, device: torch.device):
    """Turns what a forward pass can die of into an InputError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        raise InputError(
            f"too little memory for {batch_size} images of {size} x {size} pixels in {name!r} on {device}: lower "
            "--batch-size (or --size, or --workers); what was measured is kept, the same command goes on from there"
        ) from error
    except AssertionError as error:  # timm's models check their input size so
        raise InputError(f"{name!r} does not take images of {size} x {size} pixels: {error}") from error
