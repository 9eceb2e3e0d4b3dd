"""The command `convert`: a foreign checkpoint becomes a model folder."""

import argparse
from pathlib import Path

from equivision_timm.cli.options import Parsers
from equivision_timm.weights.convert import convert_file

__all__ = ["register"]


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a foreign checkpoint",
        description="Writes DIR/model.safetensors and DIR/config.json, which create_model('local-dir:DIR', "
        "pretrained=True) loads, and prints where the weights come from. The signs of a D4 or D8 checkpoint without "
        "its kernel basis are found on photographs.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="checkpoint file of equivision, ReDet or octic-vits")
    add("--model", required=True, metavar="NAME", help="the model, e.g. c8resnet50")
    add("--out", type=Path, required=True, metavar="DIR", help="model folder to write")
    add("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    add("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=run, interrupted="nothing was written to {out}")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; returns the exit status."""
    provenance = convert_file(args.checkpoint, args.model, args.out, args.images, args.signs)
    for name, value in {"written": args.out, **provenance}.items():
        print(f"{name:18} {value}")
    return 0
