"""`equivision-timm COMMAND ...`, also `python -m equivision_timm`; or `... SCRIPT.py` for a script of timm.

Each command is a file, which adds its options in `register(commands)`.
"""

import argparse
import difflib
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
from equivision_timm.cli.options import libraries, message
from equivision_timm.errors import InputError, install_command, one_line
from equivision_timm.layers.strategies import native_library

__all__ = ["main", "make_parser"]

_COMMANDS = (demo, list_models, predict, export, rotate_eval, show, tune, configs, fetch, publish, convert, verify)
_EXTRAS = {"matplotlib": "tools", "onnx": "export", "onnxruntime": "export", "onnxscript": "export", "gdown": "fetch"}
_WHERE = (
    "timm's scripts are in its repository, not in its wheel: git clone "
    "https://github.com/huggingface/pytorch-image-models, and give the path of the script"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command, or the script named in its place, whose errors pass through.

    Returns:
        The exit status: 0; 1 if the work or a check of `verify` failed; 2 for input that cannot be used; 130 after
        Ctrl-C. All but 0 come with one line on stderr; `python -X dev` shows the traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    args = argparse.Namespace(interrupted="nothing was done", typed=[*_program().split(), *arguments])
    parser, names = make_parser()
    label = first if first in names else "equivision_timm"
    try:
        if not first or first.startswith("-") or first in names:
            parser.parse_args(arguments, args)
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # characters that its encoding lacks
            status = args.run(args)
            sys.stdout.flush()  # here, so that a closed pipe is noticed here
            return status
        if not os.path.isfile(first):
            near = difflib.get_close_matches(first.lower().replace("_", "-"), names, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else _WHERE
            parser.error(f"{first!r} is neither a command nor a script: {remedy}")
    except (Exception, KeyboardInterrupt) as error:
        return _report(label, error, args)
    sys.argv = arguments  # as `python SCRIPT.py ...` runs it
    sys.path[0] = str(Path(first).resolve().parent)  # where Python searches first for a script's own modules
    runpy.run_path(first, run_name="__main__")
    return 0


def make_parser() -> tuple[argparse.ArgumentParser, Iterable[str]]:
    """The parser, and the names of the commands."""
    parser = _Parser(
        prog=_program(),
        description="Equivariant image models for timm.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{_program()} SCRIPT.py ... runs a script of timm with the models registered.",
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


def _program() -> str:
    """How the user called this program."""
    called = Path(sys.argv[0]).stem if sys.argv else ""
    return called if called == "equivision-timm" else "python -m equivision_timm"


def _report(label: str, error: BaseException, args: argparse.Namespace) -> int:
    """Print on one line of stderr what ended a command; returns its exit status."""
    if isinstance(error, BrokenPipeError):  # `| head` has read enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        print(f"{label}: interrupted; {one_line(args.interrupted.format(**vars(args)))}", file=sys.stderr)
        return 130
    extra = _EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
    if extra:
        error = InputError(f"{error}: {install_command(extra)}")
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower()):
        error = InputError(f"too little memory: lower --batch-size or --size; {message(error)[:120]}")
    if sys.flags.dev_mode and not isinstance(error, InputError):
        traceback.print_exception(error)
    print(f"{label}: {message(error)}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, AssertionError, FileNotFoundError)) else 1  # what the user gave
