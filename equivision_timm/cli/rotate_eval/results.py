"""What rotate-eval has measured so far: sums over images, in a JSON file that an interrupted run continues from."""

import csv
import io
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from equivision_timm.arguments import InputError
from equivision_timm.files import write_file

__all__ = ["METRICS", "Cell", "Results"]

METRICS = ("top1", "top5", "agreement", "drift")
_PATIENCE = 60  # seconds to wait for another process, which holds the lock while it writes


@dataclass(frozen=True)
class Cell:
    """One model at one image size, predicting in one way: sums over the images measured so far, an entry per angle.

    Attributes:
        model: as the user named it.
        size: side of the images in pixels.
        turns: over how many rotations of each image, 360 / turns degrees apart, the logits are averaged.
        position: how many files of the folder have been taken.
        images: how many of them were measured.
        unreadable: names of the others.
        sums: for each of `METRICS` the sum over the images, by angle; top1 and top5 are missing without labels.
        stages: for each stage the sum of its errors over the images, by angle; empty where they were not asked for.
        weights: SHA-256 of the model's tensors, see `hash_tensors`.
        command: what the user typed; '' where the call came from Python.
        versions: of the libraries, and the device.
        date: of the last batch.
    """

    model: str
    size: int
    turns: int = 1
    position: int = 0
    images: int = 0
    unreadable: tuple[str, ...] = ()
    sums: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)
    weights: str = ""
    command: str = ""
    versions: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells cells apart: model, size, rotations averaged."""
        return self.model, self.size, self.turns

    def add(
        self,
        taken: int,
        images: int,
        unreadable: list[str],
        sums: dict[str, list[float]],
        stages: dict[str, list[float]],
    ) -> "Cell":
        """The cell after one more batch."""
        return replace(
            self,
            position=self.position + taken,
            images=self.images + images,
            unreadable=(*self.unreadable, *unreadable),
            sums=_added(self.sums, sums),
            stages=_added(self.stages, stages),
        )

    def mean(self, metric: str) -> list[float]:
        """The mean over the images, by angle; per cent for all but the drift."""
        scale = 1.0 if metric == "drift" else 100.0
        return [scale * value / self.images for value in self.sums[metric]]

    def stage_errors(self, stage: str) -> list[float]:
        """The mean error of a stage over the images, by angle."""
        return [value / self.images for value in self.stages[stage]]

    def metrics(self) -> list[str]:
        """The metrics this cell holds, in the order of `METRICS`."""
        return [metric for metric in METRICS if metric in self.sums]


def _added(before: dict[str, list[float]], new: dict[str, list[float]]) -> dict[str, list[float]]:
    """The sums after one more batch; one of unreadable images adds nothing."""
    if not before or not new:
        return before or new
    return {name: [a + b for a, b in zip(before[name], new[name], strict=True)] for name in new}


class Results:
    """The cells of one data folder under one set of angles, kept in `path` after every change.

    Several processes may keep their cells in one file: each change is made under a lock, to what the file then holds.

    Args:
        path: the JSON file; continued where it exists.
        settings: what all cells share: data, angles, corners, whether stages are measured.

    Raises:
        InputError: the file holds results of other settings, or is none of ours.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.cells: dict[tuple[str, int, int], Cell] = {}
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=_PATIENCE)
        self.merge()

    def cell(self, model: str, size: int, turns: int, weights: str) -> Cell:
        """What has been measured of a model with these weights at a size, by this process or another.

        Raises:
            InputError: what has been measured under this name had other weights.
        """
        self.merge()
        cell = self.cells.get((model, size, turns), Cell(model, size, turns, weights=weights))
        if cell.weights != weights:
            raise InputError(
                f"{self.path} holds figures of {model!r} with other weights ({cell.weights[:8]}... there, "
                f"{weights[:8]}... here): choose another --out"
            )
        return cell

    def merge(self) -> None:
        """Take over what other processes have put into the file; of two states of a cell the one that is further.

        Raises:
            InputError: as above.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return
        for cell in self._read(text):
            mine = self.cells.get(cell.key)
            if mine is None or mine.position < cell.position:
                self.cells[cell.key] = cell

    def _read(self, text: bytes) -> list[Cell]:
        try:
            content = json.loads(text)
            found = content["settings"]
            differing = [name for name in self.settings if found.get(name) != self.settings[name]]
            cells = [] if differing else [_cell(entry, self.settings) for entry in content["cells"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.path} holds no results of rotate-eval ({error}): choose another --out") from error
        if differing:
            listed = ", ".join(f"{name} {found.get(name)!r} there, {self.settings[name]!r} here" for name in differing)
            raise InputError(f"{self.path} was measured with other settings ({listed}): choose another --out")
        return cells

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the folder meanwhile; what others have measured is taken over first.

        Raises:
            OSError: another process holds the lock for a minute.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.merge()
            yield

    def put(self, cell: Cell) -> None:
        """Add or continue a cell; the file is replaced as a whole, so that it is never half written."""
        with self.locked():
            held = self.cells.get(cell.key)
            if held is None or held.position < cell.position:
                self.cells[cell.key] = cell
            content = {"settings": self.settings, "cells": [asdict(cell) for cell in self.cells.values()]}
            write_file(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def measured(self) -> list[Cell]:
        """The cells that hold at least one image."""
        return [cell for cell in self.cells.values() if cell.images]

    def csv(self) -> bytes:
        """One row per model, size, rotations averaged and angle: per cent for top1, top5 and agreement."""
        cells = self.measured()
        metrics = cells[0].metrics()
        rows = [["model", "size", "turns", "angle", "images", *metrics]]
        for cell in cells:
            means = [cell.mean(metric) for metric in metrics]
            for angle, *values in zip(self.settings["angles"], *means, strict=True):
                row = [_no_formula(cell.model), cell.size, cell.turns, f"{angle:g}", cell.images]
                rows.append([*row, *(f"{v:.6g}" for v in values)])
        return _csv(rows)

    def stages_csv(self) -> bytes:
        """One row per model, size, stage and angle."""
        rows = [["model", "size", "stage", "angle", "images", "error"]]
        for cell in self.measured():
            for stage in cell.stages:
                for angle, error in zip(self.settings["angles"], cell.stage_errors(stage), strict=True):
                    row = [_no_formula(cell.model), cell.size, _no_formula(stage), f"{angle:g}", cell.images]
                    rows.append([*row, f"{error:.6g}"])
        return _csv(rows)


def _cell(entry: dict[str, Any], settings: dict[str, Any]) -> Cell:
    """A cell from a file, which may hold anything.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no cell, or none of these settings.
    """
    metrics = METRICS if settings["labelled"] else METRICS[2:]
    sums = {name: [float(value) for value in entry["sums"][name]] for name in metrics} if entry["images"] else {}
    stages = {str(name): [float(value) for value in values] for name, values in entry["stages"].items()}
    cell = Cell(
        model=str(entry["model"]),
        size=operator.index(entry["size"]),
        turns=operator.index(entry["turns"]),
        position=operator.index(entry["position"]),
        images=operator.index(entry["images"]),
        unreadable=tuple(str(name) for name in entry["unreadable"]),
        sums=sums,
        stages=stages,
        **{name: str(entry[name]) for name in ("weights", "command", "versions", "date")},
    )
    if bool(stages) != bool(settings["by_stage"] and cell.images):
        raise ValueError(f"{cell.model!r} has the stages {list(stages)}")
    if not 0 <= cell.position <= settings["files"] or cell.position != cell.images + len(cell.unreadable):
        raise ValueError(f"{cell.model!r} has {cell.images} images of {cell.position} files")
    if any(len(values) != len(settings["angles"]) for values in (*cell.sums.values(), *stages.values())):
        raise ValueError(f"{cell.model!r} has not as many sums as there are angles")
    return cell


def _csv(rows: list[list]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(errors="backslashreplace")


def _no_formula(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
