"""The command `verify`: checks of weights, one row each."""

import argparse
import json
from pathlib import Path

from equivision_timm.cli.options import Parsers
from equivision_timm.errors import InputError
from equivision_timm.weights.verify import as_json, as_table, verify

__all__ = ["register"]


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "verify",
        help="check weights: hash, origin, values, equivariance, statistics, accuracy",
        description="Prints a table; exit status 1 if a check fails.",
    )
    add = parser.add_argument
    add("target", metavar="PATH_OR_NAME", help="model folder, safetensors file, or pretrained model")
    add("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    add("--data", type=Path, metavar="DIR", help="labelled images, such as ImageNet's validation set")
    add("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=run, interrupted="not all was checked")


def run(args: argparse.Namespace) -> int:
    """Print the checks; returns the exit status."""
    if Path(args.target).suffix in (".pth", ".pt", ".tar", ".ckpt", ".bin"):
        raise InputError(
            f"{args.target!r} is a checkpoint, and verify checks model folders and safetensors files: convert "
            f"{args.target} --model NAME --out DIR, or timm's validate.py --model NAME --checkpoint {args.target}"
        )
    checks = verify(args.target, args.images, args.data)
    result = as_json(checks)
    print(json.dumps(result, indent=1) if args.json else as_table(checks))
    return 0 if result["ok"] else 1
