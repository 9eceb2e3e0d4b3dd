"""The checkpoints that others released: where they lie and what is reported about them, a table in each room."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Released", "find_released", "released_in"]


@dataclass(frozen=True)
class Released:
    """A checkpoint that somebody released.

    Attributes:
        project: its name.
        source: the project's address.
        drive_id: of the file on Google Drive.
        reported: accuracies on ImageNet-1k at 224 x 224, between 0 and 1, by what they are of: 'top1', 'top5', ...
        citation: of the works behind it, BibTeX.
        sha256: of the file, or its first digits; None where unknown. The file on Drive may be newer.
    """

    project: str
    source: str
    drive_id: str
    reported: dict[str, float]
    citation: str
    sha256: str | None = None


def released_in(room: str) -> dict[str, Released]:
    """The released checkpoints that a room reads, by the name of the model.

    Args:
        room: name of its folder, which holds `released.json` and `citation.bib`.
    """
    table = _table(room)
    citation = Path(__file__).with_name(room).joinpath("citation.bib").read_text(encoding="utf-8")
    shared = {"project": table["project"], "source": table["source"], "citation": citation}
    return {name: Released(**shared, **entry) for name, entry in table["checkpoints"].items()}


def find_released(room: str, model_name: str) -> Released:
    """The one of `model_name`.

    Raises:
        ValueError: the project released none.
    """
    found = released_in(room)
    if model_name not in found:
        raise ValueError(f"{_table(room)['project']} has no weights of {model_name}; there are: {', '.join(found)}")
    return found[model_name]


@cache
def _table(room: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(room).joinpath("released.json").read_text(encoding="utf-8"))
