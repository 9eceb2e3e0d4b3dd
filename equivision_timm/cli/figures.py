"""Pictures drawn by matplotlib, which only some commands need: files in its formats, text as it stands."""

import io
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from equivision_timm.errors import InputError
from equivision_timm.files import check_writable

__all__ = ["FORMATS", "check_figure_file", "figure_bytes", "plain_text"]

# Written without other programs: PGF needs LaTeX; raw pixels are not a picture format
FORMATS = tuple(f".{kind}" for kind in Figure().canvas.get_supported_filetypes() if kind not in ("pgf", "raw", "rgba"))


def plain_text() -> AbstractContextManager[None]:
    """Context in which a `$` begins no formula; it must enclose the drawing and the saving."""
    return matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})


def check_figure_file(path: Path, make_folders: bool = False) -> None:
    """Raise InputError if the ending is not a picture format or the file cannot be written, see `check_writable`."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path} has no ending of a picture: use one of {', '.join(FORMATS)}")
    check_writable(path, make_folders)


def figure_bytes(figure: Figure, suffix: str, dpi: int) -> bytes:
    """The contents of a file with this ending."""
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:].lower(), dpi=dpi)
    return content.getvalue()
