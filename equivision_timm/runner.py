"""Runs a script of timm (`train.py`, `validate.py`, ...) unmodified, with the equivariant models registered."""

import importlib.util
import runpy
import sys
from pathlib import Path

import equivision_timm  # noqa: F401  registers models and data set before the script asks for them

__all__ = ["run_script"]

_WHERE = (
    "timm's scripts are in its repository, not in its wheel: git clone "
    "https://github.com/huggingface/pytorch-image-models, and give the path of the script"
)


def run_script(script: str, arguments: list[str]) -> None:
    """Run the file `script` as `python script arguments...` would; its errors and its exit status pass through.

    Raises:
        SystemExit: with a message, where `script` is no file; with the script's own status, where it exits.
    """
    path = Path(script)
    if not path.is_file():
        sys.exit(f"equivision_timm: {_what_is_wrong(script)}")
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)  # where Python looks first for a script's own modules
    runpy.run_path(script, run_name="__main__")


def _what_is_wrong(script: str) -> str:
    if Path(script).is_dir():
        return f"{script!r} is a folder, not a script: name a file in it, such as {Path(script, 'train.py')}. {_WHERE}"
    if script.isidentifier() and importlib.util.find_spec(script):
        return f"{script!r} is a package, not a script. {_WHERE}"
    return f"{script!r} is neither a sub-command (see python -m equivision_timm --help) nor a file. {_WHERE}"
