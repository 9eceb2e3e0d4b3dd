"""`equivision-timm COMMAND ...`, also `python -m equivision_timm`; or `... SCRIPT.py` for a script of timm.

Each command is a file, which adds its options in `register(commands)`.
"""

import argparse
import io
import os
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from equivision_timm.cli import (
    configs,
    convert,
    demo,
    export,
    fetch,
    list_models,
    predict,
    publish,
    rotate_eval,
    show,
    tune,
    verify,
)
from equivision_timm.cli.options import libraries
from equivision_timm.errors import InputError, install_command, reason
from equivision_timm.layers.strategies import native_library

__all__ = ["main", "make_parser"]

_COMMANDS = (demo, list_models, predict, export, rotate_eval, show, tune, configs, fetch, publish, convert, verify)
_EXTRAS = {"matplotlib": "tools", "onnx": "export", "onnxruntime": "export", "onnxscript": "export"}
_EXTRAS |= {"gdown": "fetch", "skimage": "convert"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command, or the script named in its place, whose errors pass through.

    Returns:
        The exit status: 0; 1 if the work or a check of `verify` failed; 2 for input that cannot be used; 130 after
        Ctrl-C. All but 0 come with one line on stderr; `python -X dev` shows the traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    parser, names = make_parser()
    if first not in names and os.path.isfile(first):
        sys.argv = arguments  # as `python SCRIPT.py ...` runs it
        sys.path[0] = str(Path(first).resolve().parent)  # where Python searches first for a script's own modules
        runpy.run_path(first, run_name="__main__")
        return 0
    try:
        args = parser.parse_args(arguments)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # characters that its encoding lacks
        status = args.run(args)
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
        return status
    except (Exception, KeyboardInterrupt) as error:
        return _report(first if first in names else "equivision_timm", error)


def make_parser() -> tuple[argparse.ArgumentParser, Iterable[str]]:
    """The parser, and the names of the commands."""
    parser = _Parser(
        prog="equivision-timm",
        description="Equivariant image models for timm.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="equivision-timm SCRIPT.py ... runs a script of a clone of timm with the models registered.",
    )
    versions = f"{libraries()}\nconv_strategy 'native': {native_library.describe()}"
    parser.add_argument("--version", action="version", version=versions, help="print the versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    return parser, commands.choices


class _Parser(argparse.ArgumentParser):
    """Leaves the output of errors to `main`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _report(label: str, error: BaseException) -> int:
    """Print on one line of stderr what ended a command; returns its exit status."""
    if isinstance(error, BrokenPipeError):  # `| head` has read enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        print(f"{label}: interrupted", file=sys.stderr)
        return 130
    extra = _EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
    if extra:
        error = InputError(f"{error}: {install_command(extra)}")
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower()):
        error = InputError(f"too little memory: lower --batch-size or --size; {reason(error, 120)}")
    if sys.flags.dev_mode and not isinstance(error, InputError):
        traceback.print_exception(error)
    print(f"{label}: {reason(error)}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, AssertionError, FileNotFoundError)) else 1  # what the user gave
