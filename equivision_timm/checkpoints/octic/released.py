"""The checkpoints that octic-vits released: where they lie and what it reports about them."""

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SOURCE", "Released", "released"]

_TABLE = json.loads(Path(__file__).with_name("released.json").read_text(encoding="utf-8"))
SOURCE: str = _TABLE["source"]


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    Attributes:
        drive_id: id of the file on Google Drive.
        accuracy: reported for ImageNet-1k at 224 x 224, between 0 and 1: 'top1' of the network; for features 'linear',
            of a linear classifier on them, and 'knn', of nearest neighbours.
    """

    drive_id: str
    accuracy: dict[str, float]


def released() -> dict[str, Released]:
    """All released checkpoints by the name of the model."""
    return {name: Released(**entry) for name, entry in _TABLE["checkpoints"].items()}
