"""Table of the checkpoints that other projects released."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Released", "released"]


@dataclass(frozen=True)
class Released:
    """A released checkpoint.

    Attributes:
        format: 'equivision', 'redet' or 'octic'.
        project: name of the project.
        source: address of the project.
        citation: BibTeX.
        drive_id: of the file on Google Drive.
        reported: accuracies on ImageNet-1k at 224 x 224, between 0 and 1, by kind: 'top1', 'top5', 'linear', 'knn'.
        sha256: of the file, or its first digits; None if unknown.
        signs: sign pattern that scripts/find_signs.py found for a D4 or D8 file; None if nobody ran it yet.
    """

    format: str
    project: str
    source: str
    citation: str
    drive_id: str
    reported: dict[str, float]
    sha256: str | None = None
    signs: str | None = None


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
