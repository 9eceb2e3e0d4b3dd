"""Options and output that several commands have."""

import argparse
import contextlib
import csv
import io
import math
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from timm.utils import ParseKwargs

import equivision_timm
from equivision_timm.cli.models import check_spec, read_class_map
from equivision_timm.errors import InputError, one_line, reason
from equivision_timm.weights.released import released

__all__ = [
    "Parsers",
    "add_command",
    "add_model",
    "add_names",
    "add_options",
    "aligned",
    "as_csv",
    "for_each",
    "libraries",
    "parse_angles",
    "positive",
]

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # of `ArgumentParser.add_subparsers`


def add_command(
    commands: Parsers, name: str, run: Callable[[argparse.Namespace], int], help: str, more: str
) -> argparse.ArgumentParser:
    """The parser of a command: `help` is the line in the list of commands, which its description continues by `more`.

    `run` returns the exit status.
    """
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, several: bool = False, option: bool = True) -> None:
    """`--model` or `--models`, two names of one option, or the argument MODEL; and `--model-kwargs`."""
    text = "any model of timm or of this package, with its pretrained weights or a checkpoint of timm's train.py"
    spec: dict[str, Any] = {"dest": "models", "nargs": "+", "action": "extend"} if several else {}
    spec |= {"required": True} if option else {}
    names = ("--model", "--models") if option else ("model",)
    parser.add_argument(*names, metavar="NAME[=CHECKPOINT]", type=check_spec, help=text, **spec)
    text = "further keywords of timm.create_model, such as backbone=resnet18 group=d4"
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help=text)


def add_names(parser: argparse.ArgumentParser, meaning_of_all: str) -> None:
    """Names of models, or `--all`."""
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("names", nargs="*", default=[], metavar="NAME", type=_released_name, help="e.g. c8resnet50")
    names.add_argument("--all", action="store_true", help=meaning_of_all)


def _released_name(name: str) -> str:
    if name not in released():
        raise InputError(f"no weights of {name} were released; there are: {', '.join(released())}")
    return name


def positive(text: str) -> int:
    """Type of an argument: an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{text!r} is not possible: give a number from 1 on")
    return int(text)


def _device(name: str) -> torch.device:
    try:
        torch.ones(1, device=name).item()
    except Exception as error:  # each kind of device has its own
        raise InputError(f"{name!r} cannot be used ({reason(error, 120)}): use cpu, or leave it out") from error
    return torch.device(name)


def parse_angles(text: str) -> list[float]:
    """The angles of 'start:stop:step' (stop included if it is met) or of a list '0,45,90', in degrees.

    Full turns are subtracted, and of angles that mean the same rotation the first is returned: 360 is 0, 270 is -90.

    Example:
        >>> parse_angles("0:360:90")
        [0.0, 90.0, 180.0, 270.0]
    """
    rotations: dict[float, float] = {}
    with contextlib.suppress(ValueError, ArithmeticError):  # not numbers, not three, no step
        if ":" in text:
            start, stop, step = map(float, text.split(":"))
            numbers = [start + step * i for i in range(int((stop - start) / step + 1e-9) + 1)]
        else:
            numbers = [float(part) for part in text.split(",")]
        for number in numbers:
            angle = math.fmod(number, 360) + 0.0  # + 0.0: no negative zero
            rotations.setdefault(round(angle % 360, 6) % 360, angle)
    if not rotations:
        raise InputError(f"{text!r} are not angles: use START:STOP:STEP or A,B,C in degrees, such as 0:360:15")
    return list(rotations.values())


_OPTIONS: dict[str, dict[str, Any]] = {
    "angles": {"type": parse_angles, "help": "START:STOP:STEP or A,B,C in degrees (default: %(default)s)"},
    "batch-size": {"type": positive, "metavar": "N", "help": "images at a time (default: %(default)s)"},
    "class-map": {
        "type": read_class_map,
        "metavar": "FILE|DIR",
        "help": "names of the classes: a file, one per line, or the training folder (default: those of the weights)",
    },
    "device": {
        "type": _device,
        "default": "cuda" if torch.cuda.is_available() else "cpu",
        "help": "device of PyTorch (default: cuda if available, else cpu)",
    },
    "images": {"type": Path, "metavar": "DIR", "help": "folder of photographs (default: those of scikit-image)"},
    "json": {"action": "store_true", "help": "print JSON instead of the table"},
    "num-classes": {"type": positive, "metavar": "N", "help": "classes (default: as trained, or the model's)"},
    "signs": {
        "metavar": "PATTERN",
        "help": "sign pattern of a D4 or D8 checkpoint, by name or as '+' and '-' (default: found on photographs)",
    },
    "size": {"type": positive, "metavar": "N", "help": "side of the images in pixels (default: as trained)"},
}


def add_options(parser: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Options that several commands have, `names` without '--'; `defaults` by destination."""
    for name in names:
        parser.add_argument(*(["-b"] if name == "batch-size" else []), f"--{name}", **_OPTIONS[name])
    parser.set_defaults(**defaults)


def for_each(names: Iterable[str], action: Callable[[str], object]) -> int:
    """Call `action` for all names, even if one fails; 1 if one did. An error that concerns all ends it."""
    status = 0
    for name in names:
        try:
            action(name)
        except (InputError, ModuleNotFoundError):  # noqa: PERF203
            raise
        except Exception as error:  # of the network, the file system, the Hub's client, ...
            print(f"{name}: {reason(error)}", file=sys.stderr)
            status = 1
    return status


def aligned(rows: Iterable[Iterable[object]], left: Collection[int] = (0,)) -> str:
    """A line for each row, with columns of equal width, those in `left` to the left."""
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    forms = [f"{{:{'<' if i in left else '>'}{width}}}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(forms).format(*row).rstrip() for row in cells)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A table with a column for every key; cells of missing keys are empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def libraries() -> str:
    """The versions of this package, timm and PyTorch."""
    return f"equivision_timm {equivision_timm.__version__}, timm {timm.__version__}, torch {torch.__version__}"
