"""Runs a script of timm (`train.py`, `validate.py`, ...) unmodified, with the equivariant models registered."""

import os
import runpy
import sys
from pathlib import Path

from equivision_timm.errors import InputError

__all__ = ["check_script", "run_script"]

_WHERE = (
    "timm's scripts are in its repository, not in its wheel: git clone "
    "https://github.com/huggingface/pytorch-image-models, and give the path of the script"
)


def check_script(script: str) -> None:
    """Raise InputError if `script` is not a file."""
    if not os.path.isfile(script):
        not_a_script = "neither a command (see python -m equivision_timm --help) nor a file"
        what = "a folder, not a script" if os.path.isdir(script) else not_a_script
        raise InputError(f"{script!r} is {what}. {_WHERE}")


def run_script(script: str, arguments: list[str]) -> None:
    """Run the file `script` as `python script arguments...` would; its errors and its exit status pass through."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # where Python searches first for a script's own modules
    runpy.run_path(script, run_name="__main__")
