"""Table of the checkpoints that other projects released."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Released", "released"]


@dataclass(frozen=True)
class Released:
    """A released checkpoint."""

    format: str  # 'equivision', 'redet' or 'octic'
    project: str
    source: str  # address of the project
    citation: str  # BibTeX
    drive_id: str  # of the file on Google Drive
    reported: dict[str, float]  # accuracies on ImageNet-1k, between 0 and 1: 'top1', 'top5', 'linear', 'knn'
    sha256: str | None = None  # of the file, or its first digits; None if unknown
    signs: str | None = None  # that scripts/find_signs.py found for a D4 or D8 file; None if nobody ran it yet


@cache
def released() -> dict[str, Released]:
    """The released checkpoints by model name."""
    folder = Path(__file__).parent
    formats = json.loads((folder / "released.json").read_text(encoding="utf-8"))["formats"]
    table = {}
    for name, entry in formats.items():
        citation = (folder / f"{name}.bib").read_text(encoding="utf-8")
        for model, row in entry["checkpoints"].items():
            table[model] = Released(name, entry["project"], entry["source"], citation, **row)
    return table
