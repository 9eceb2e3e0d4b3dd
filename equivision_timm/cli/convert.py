"""The command `convert`: a foreign checkpoint becomes a model folder."""

import argparse
from pathlib import Path

from equivision_timm.cli.options import Parsers, add_command, add_options, aligned
from equivision_timm.weights.convert import convert_file

__all__ = ["register"]


def register(commands: Parsers) -> None:
    text = "convert a checkpoint of equivision, ReDet, octic-vits or flopping-for-flops into a model folder"
    more = """Writes DIR/model.safetensors and DIR/config.json, which create_model('local-dir:DIR',
        pretrained=True) loads, and prints the origin of the weights."""
    parser = add_command(commands, "convert", run, text, more)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="checkpoint file of the other project")
    add("--model", "--models", required=True, metavar="NAME", help="model of this package, e.g. c8resnet50")
    add("--out", type=Path, required=True, metavar="DIR", help="model folder to write")
    add_options(parser, "images", "signs")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint; returns the exit status."""
    provenance = convert_file(args.checkpoint, args.model, args.out, args.images, args.signs)
    print(aligned({"written": args.out, **provenance}.items(), left=(0, 1)))
    return 0
