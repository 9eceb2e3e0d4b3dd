"""The command `verify`: checks of weights, one row each."""

import argparse
import json
from pathlib import Path

from equivision_timm.cli.options import Parsers, add_command, add_options
from equivision_timm.errors import InputError
from equivision_timm.weights.verify import as_json, as_table, verify

__all__ = ["register"]


def register(commands: Parsers) -> None:
    text = "check weights: hash, origin, values, equivariance, statistics, accuracy"
    more = "Prints a table with a row for each check; the exit status is 1 if one fails."
    parser = add_command(commands, "verify", run, "not all was checked", text, more)
    add = parser.add_argument
    add("target", metavar="PATH_OR_NAME", help="model folder, safetensors file, or pretrained model")
    add("--data", type=Path, metavar="DIR", help="labelled images, such as ImageNet's validation set")
    add_options(parser, "images", "json")


def run(args: argparse.Namespace) -> int:
    """Print the checks; returns the exit status."""
    if Path(args.target).suffix in (".pth", ".pt", ".tar", ".ckpt", ".bin"):
        raise InputError(
            f"{args.target!r} is a checkpoint, and verify checks model folders and safetensors files: use convert "
            f"{args.target} --model NAME --out DIR, or timm's validate.py --model NAME --checkpoint {args.target}"
        )
    checks = verify(args.target, args.images, args.data)
    result = as_json(checks)
    print(json.dumps(result, indent=1) if args.json else as_table(checks))
    return 0 if result["ok"] else 1
