"""Results of `rotate-eval`: sums over images, under the settings that they depend on, in a JSON file."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from equivision_timm.errors import InputError, shortened
from equivision_timm.files import write_file

__all__ = ["METRICS", "Result", "Results", "Settings"]

METRICS = ("top1", "top5", "agreement", "drift")
# In these settings the results of one folder, hence of one report, agree
_SHARED = ("data", "images", "targets", "files", "angles", "corners", "precision", "by_stage")


@dataclass(frozen=True)
class Settings:
    """Everything that the figures of a result depend on: the key under which it is stored.

    Of one model at one size with so many turns there is one result.
    """

    data: str  # name of the folder of images
    images: str  # SHA-256 of the names and contents of its files
    targets: str  # SHA-256 of their classes; '' without labels
    files: int  # their number
    angles: list[float]  # in degrees, counter-clockwise
    # 'reflect': the image is reflected at its border; 'circle': at every angle, zero included, only the inscribed
    # circle is shown, on the mean colour
    corners: str
    precision: str  # 'float32', or the type of mixed precision
    by_stage: bool  # whether the feature maps of each stage are measured
    model: str = ""  # its spec
    size: int = 0  # side of the images in pixels
    turns: int = 1  # the logits are averaged over so many rotations of each image, 360 / turns degrees apart
    weights: str = ""  # SHA-256 of the model's tensors
    options: dict[str, Any] = field(default_factory=dict)  # keywords with which the model was created
    preparation: dict[str, Any] = field(default_factory=dict)  # timm's data config: mean, std, crop, interpolation
    classes: int = 0  # number of classes of the model

    def plain(self) -> dict[str, Any]:
        """As JSON has it: lists for tuples."""
        return json.loads(json.dumps(asdict(self), default=str))

    def differences(self, other: "Settings") -> list[str]:
        """The fields in which `other` must not differ, and does, with both values."""
        same = self.cell == other.cell
        mine, its = self.plain(), other.plain()
        names = [name for name in mine if mine[name] != its[name] and (same or name in _SHARED)]
        return [
            f"{name}: {shortened(str(its[name]), 60)} there, {shortened(str(mine[name]), 60)} here" for name in names
        ]

    @property
    def cell(self) -> tuple[str, int, int]:
        """Model, size and turns."""
        return self.model, self.size, self.turns


@dataclass(frozen=True)
class Result:
    """Sums over the images measured so far under some settings, an entry per angle."""

    settings: Settings  # the key
    position: int = 0  # number of files taken
    images: int = 0  # number of images measured
    unreadable: list[str] = field(default_factory=list)  # names of the other files
    # for each of `METRICS` the sum over the images, by angle; without labels no top1 and top5
    sums: dict[str, list[float]] = field(default_factory=dict)
    # for each stage the sum of its errors, by angle; empty unless measured
    stages: dict[str, list[float]] = field(default_factory=dict)
    command: str = ""  # what the user typed
    versions: str = ""  # of the libraries, and the device
    date: str = ""  # of the last batch

    def add(
        self, images: int, unreadable: list[str], sums: dict[str, list[float]], stages: dict[str, list[float]]
    ) -> "Result":
        """The result after one more batch."""
        position = self.position + images + len(unreadable)
        added = {"sums": _added(self.sums, sums), "stages": _added(self.stages, stages)}
        names = [*self.unreadable, *unreadable]
        return replace(self, position=position, images=self.images + images, unreadable=names, **added)

    def mean(self, metric: str) -> list[float]:
        """The mean over the images, by angle; in per cent except for the drift."""
        scale = 1.0 if metric == "drift" else 100.0
        return [scale * value / self.images for value in self.sums[metric]]

    def stage_errors(self, stage: str) -> list[float]:
        """The mean error of a stage over the images, by angle."""
        return [value / self.images for value in self.stages[stage]]

    def metrics(self) -> list[str]:
        """The metrics that were measured, in the order of `METRICS`."""
        return [metric for metric in METRICS if metric in self.sums]


def _added(before: dict[str, list[float]], new: dict[str, list[float]]) -> dict[str, list[float]]:
    if not before or not new:
        return before or new
    return {name: [a + b for a, b in zip(before[name], new[name], strict=True)] for name in new}


class Results:
    """The results in a JSON file, which several processes may share: a change is made under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=60)

    def read(self) -> list[Result]:
        """All results; [] without a file.

        Raises:
            InputError: the file holds something else.
        """
        try:
            entries = json.loads(self.path.read_bytes())["results"]
            return [Result(**{**entry, "settings": Settings(**entry["settings"])}) for entry in entries]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} holds no results of this rotate-eval ({error}): choose another --out"
            ) from error

    def find(self, settings: Settings) -> Result:
        """The result under these settings, or an empty one.

        Raises:
            InputError: the file holds results that may not stand beside it.
        """
        stored = self.read()
        for other in stored:
            if differences := settings.differences(other.settings):
                raise InputError(
                    f"{self.path} was measured with other settings ({'; '.join(differences)}): choose another --out"
                )
        return next((result for result in stored if result.settings.cell == settings.cell), Result(settings))

    def put(self, result: Result) -> None:
        """Add or continue a result; of two states of one the file keeps the one with more images."""
        with self.locked():
            held = self.find(result.settings)
            if held.position < result.position:
                others = [other for other in self.read() if other.settings.cell != result.settings.cell]
                content = {"results": [{**asdict(r), "settings": r.settings.plain()} for r in (*others, result)]}
                write_file(self.path, (json.dumps(content, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process changes the folder meanwhile. Raises OSError if one holds the lock for a minute."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield
