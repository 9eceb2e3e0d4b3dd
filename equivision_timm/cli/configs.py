"""The command `configs`: the training recipes of the package, copied into a folder."""

import argparse
from pathlib import Path

import equivision_timm
from equivision_timm.cli.options import Parsers, add_command
from equivision_timm.errors import InputError, one_line
from equivision_timm.files import check_writable, write_file

__all__ = ["find_configs", "register"]


def register(commands: Parsers) -> None:
    text = "copy the training recipes (YAML files for timm's train.py) into a folder"
    more = "The head of each recipe gives its purpose and the commands that train, evaluate and use the network."
    parser = add_command(commands, "configs", run, text, more)
    text = "folder to write (default: %(default)s)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("configs"), metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Copy the recipes and print their paths; returns the exit status."""
    copies = {args.folder / recipe.name: recipe.read_bytes() for recipe in find_configs()}
    check_writable(next(iter(copies)))
    for path, content in copies.items():
        if path.exists() and path.read_bytes() != content:
            raise InputError(f"{str(path)!r} differs from the recipe of this package: name another folder")
    for path, content in copies.items():
        write_file(path, content)
        print(one_line(str(path)))
    return 0


def find_configs() -> list[Path]:
    """The recipes: inside the package in a wheel, beside it in a clone."""
    package = Path(equivision_timm.__file__).parent
    return sorted(next(found for place in (package, package.parent) if (found := [*place.glob("configs/*.yaml")])))
