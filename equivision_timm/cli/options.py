"""Options that several commands have, a loop over models, the text of an error."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from timm.utils import ParseKwargs

from equivision_timm.errors import InputError, one_line

__all__ = [
    "Parsers",
    "add_batches",
    "add_class_map",
    "add_model_kwargs",
    "add_names",
    "add_num_classes",
    "add_size",
    "for_each",
    "integer",
    "message",
    "parse_angles",
]

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # of `ArgumentParser.add_subparsers`

_MOST_ANGLES = 3600


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of an argument: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible: give a number from {least} to {most}")
        return number

    return parse


def add_size(parser: argparse.ArgumentParser, **options: Any) -> None:
    """`--size`: side of the images."""
    text = "image size (default: that of the checkpoint's training, or the model's)"
    parser.add_argument("--size", type=integer(1, 8192), metavar="N", help=text, **options)


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """`--model-kwargs`, as timm's scripts have it."""
    text = "further keywords of timm.create_model, such as backbone=resnet18 group=d4"
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help=text)


def add_num_classes(parser: argparse.ArgumentParser) -> None:
    """`--num-classes`: of the models."""
    text = "classes of the models (default: as trained, or the model's)"
    parser.add_argument("--num-classes", type=integer(1, 10**6), metavar="N", help=text)


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """`--class-map`: names of the classes."""
    text = "names of the classes, one per line, or the training folder"
    parser.add_argument("--class-map", type=Path, metavar="FILE|DIR", help=text)


def add_batches(parser: argparse.ArgumentParser, size: int) -> None:
    """`--batch-size` and `--device`."""
    text = "images at a time (default: %(default)s)"
    parser.add_argument("-b", "--batch-size", type=integer(1), default=size, metavar="N", help=text)
    parser.add_argument("--device", help="where to compute (default: cuda if there is one, else cpu)")


def add_names(parser: argparse.ArgumentParser, meaning_of_all: str) -> None:
    """Names of models, or `--all`."""
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("names", nargs="*", default=[], metavar="NAME", help="models, e.g. c8resnet50")
    names.add_argument("--all", action="store_true", help=meaning_of_all)


def parse_angles(text: str) -> list[float]:
    """The angles of 'start:stop:step' (stop included if it is met) or of a list '0,45,90', in degrees.

    Full turns are subtracted, and of angles that mean the same rotation the first is returned: 360 is 0, 270 is -90.

    Raises:
        InputError: neither of them, or more than 3600 angles.

    Example:
        >>> parse_angles("0:360:90")
        [0.0, 90.0, 180.0, 270.0]
    """
    numbers: list[float] = []
    with contextlib.suppress(ValueError):  # not numbers, or not three
        if ":" in text:
            start, stop, step = map(float, text.split(":"))
            steps = (stop - start) / step + 1e-9 if step > 0 else -1
            numbers = [start + step * i for i in range(int(steps) + 1)] if 0 <= steps < _MOST_ANGLES else []
        else:
            numbers = [float(part) for part in text.split(",")]
    if not 0 < len(numbers) <= _MOST_ANGLES or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"{text!r} is not a list of up to {_MOST_ANGLES} angles: use START:STOP:STEP or A,B,C in degrees, as "
            "0:360:15"
        )
    rotations: dict[float, float] = {}
    for number in numbers:
        angle = math.fmod(number, 360) + 0.0  # + 0.0: no negative zero
        rotations.setdefault(round(angle % 360, 6) % 360, angle)
    return list(rotations.values())


def for_each(names: Iterable[str], action: Callable[[str], object]) -> int:
    """Call `action` for all names, even if one fails; 1 if one did. An InputError, which concerns all, ends it."""
    status = 0
    for name in names:
        try:
            action(name)
        except InputError:  # noqa: PERF203
            raise
        except Exception as error:  # of the network, the file system, the Hub's client, ...
            print(f"{one_line(name)}: {type(error).__name__}: {message(error)}", file=sys.stderr)
            status = 1
    return status


def message(error: BaseException) -> str:
    """The error on one line, with its type unless that adds nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if any(line.startswith("Traceback") for line in lines) else " ".join(lines)
    explained = isinstance(error, (ValueError, OSError, ModuleNotFoundError)) or text == type(error).__name__
    return one_line(text if explained else f"{type(error).__name__}: {text}")
