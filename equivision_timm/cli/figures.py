"""Pictures drawn by matplotlib, which only some commands need: files in its formats, text as it stands."""

import io
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from equivision_timm.files import check_writable

__all__ = ["check_figure_file", "figure_bytes", "plain_text"]


def plain_text() -> AbstractContextManager[None]:
    """Context in which a `$` begins no formula; it must enclose the drawing and the saving."""
    return matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})


def check_figure_file(path: Path) -> None:
    """Raise ValueError, before the work, unless matplotlib has this format and the file can be written."""
    figure_bytes(Figure(figsize=(1, 1)), path.suffix, dpi=10)
    check_writable(path)


def figure_bytes(figure: Figure, suffix: str, dpi: int) -> bytes:
    """The contents of a file with this ending."""
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:].lower(), dpi=dpi)
    return content.getvalue()
