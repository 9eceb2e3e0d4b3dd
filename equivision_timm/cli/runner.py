"""Runs a script of timm (`train.py`, `validate.py`, ...) unmodified, with the equivariant models registered."""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import equivision_timm  # noqa: F401  registers models and data set before the script asks for them
from equivision_timm.arguments import InputError

__all__ = ["check_script", "run_script"]

_WHERE = (
    "timm's scripts are in its repository, not in its wheel: git clone "
    "https://github.com/huggingface/pytorch-image-models, and give the path of the script"
)


def check_script(script: str) -> None:
    """Raises InputError where `script` is no file that can be read."""
    if os.path.isdir(script):
        example = Path(script, "train.py")
        raise InputError(f"{script!r} is a folder, not a script: name a file in it, such as {example}. {_WHERE}")
    if not os.path.isfile(script):
        raise InputError(f"{script!r} is {_kind_of_name(script)}. {_WHERE}")
    try:
        Path(script).open("rb").close()
    except OSError as error:
        raise InputError(f"the script {script!r} cannot be read: {error.strerror}") from error


def run_script(script: str, arguments: list[str]) -> None:
    """Run the file `script` as `python script arguments...` would; its errors and its exit status pass through."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # where Python looks first for a script's own modules
    runpy.run_path(script, run_name="__main__")


def _kind_of_name(script: str) -> str:
    if script.isidentifier() and script != "__main__" and importlib.util.find_spec(script):
        return "a package, not a script"
    return "neither a sub-command (see python -m equivision_timm --help) nor a file"
