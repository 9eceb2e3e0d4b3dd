"""The checkpoints that the original project released: where they lie and what it reports about them."""

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
        top1: reported top-1 accuracy on ImageNet-1k at 224 x 224, between 0 and 1.
        top5: the same for top-5.
        bytes: size of the file in September 2023, None where unknown.
        sha256: its hash, None where unknown; the file on Drive may be newer.
    """

    drive_id: str
    top1: float
    top5: float
    bytes: int | None = None
    sha256: str | None = None


def released() -> dict[str, Released]:
    """All released checkpoints by the name of the model."""
    return {name: Released(**entry) for name, entry in _TABLE["checkpoints"].items()}
