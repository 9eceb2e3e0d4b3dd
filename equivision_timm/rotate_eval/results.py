"""What rotate-eval has measured so far: sums over images, in a JSON file that an interrupted run continues from."""

import csv
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from equivision_timm.loading import InputError

__all__ = ["METRICS", "Cell", "Results"]

METRICS = ("top1", "top5", "agreement", "drift")


@dataclass(frozen=True)
class Cell:
    """One model at one image size: sums over the images measured so far, a list entry per angle.

    Attributes:
        model: as the user named it.
        size: side of the images in pixels.
        position: how many files of the folder have been taken.
        images: how many of them were measured.
        unreadable: names of the others.
        sums: for each of `METRICS` the sum over the images, by angle; top1 and top5 are missing without labels.
    """

    model: str
    size: int
    position: int = 0
    images: int = 0
    unreadable: tuple[str, ...] = ()
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, taken: int, images: int, unreadable: list[str], sums: dict[str, list[float]]) -> "Cell":
        """The cell after one more batch."""
        before = {name: self.sums.get(name, [0.0] * len(values)) for name, values in sums.items()}
        return replace(
            self,
            position=self.position + taken,
            images=self.images + images,
            unreadable=(*self.unreadable, *unreadable),
            sums={name: [a + b for a, b in zip(before[name], sums[name], strict=True)] for name in sums}
            or self.sums,  # a batch of unreadable images adds nothing
        )

    def mean(self, metric: str) -> list[float]:
        """The mean over the images, by angle; per cent for all but the drift."""
        scale = 1.0 if metric == "drift" else 100.0
        return [scale * value / self.images for value in self.sums[metric]]

    def metrics(self) -> list[str]:
        """The metrics this cell holds, in the order of `METRICS`."""
        return [metric for metric in METRICS if metric in self.sums]


class Results:
    """The cells of one data folder under one set of angles, kept in `path` after every change.

    Args:
        path: the JSON file; continued where it exists.
        settings: what all cells share: data, angles, corners.

    Raises:
        InputError: the file holds results of other settings, or is none of ours.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.cells: dict[tuple[str, int], Cell] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            found = content["settings"]
            cells = [Cell(**{**cell, "unreadable": tuple(cell["unreadable"])}) for cell in content["cells"]]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} holds no results of rotate-eval ({error}): choose another --out") from error
        differing = [name for name in self.settings if found.get(name) != self.settings[name]]
        if differing:
            listed = ", ".join(f"{name} {found.get(name)!r} there, {self.settings[name]!r} here" for name in differing)
            raise InputError(f"{self.path} was measured with other settings ({listed}): choose another --out")
        self.cells = {(cell.model, cell.size): cell for cell in cells}

    def put(self, cell: Cell) -> None:
        """Add or replace a cell; the file is replaced as a whole, so that it is never half written."""
        self.cells[cell.model, cell.size] = cell
        content = {"settings": self.settings, "cells": [asdict(cell) for cell in self.cells.values()]}
        scratch = self.path.with_suffix(".json.part")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(scratch, self.path)

    def measured(self) -> list[Cell]:
        """The cells that hold at least one image."""
        return [cell for cell in self.cells.values() if cell.images]

    def write_csv(self, path: Path) -> None:
        """One row per model, size and angle: per cent for top1, top5 and agreement."""
        cells = self.measured()
        metrics = cells[0].metrics()
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "size", "angle", "images", *metrics])
            for cell in cells:
                means = [cell.mean(metric) for metric in metrics]
                for angle, *values in zip(self.settings["angles"], *means, strict=True):
                    writer.writerow([cell.model, cell.size, f"{angle:g}", cell.images, *(f"{v:.6g}" for v in values)])
