"""The command `publish`: weights on the Hub."""

import argparse
import sys
from pathlib import Path

from equivision_timm.cli.options import Parsers, add_command, add_names, for_each
from equivision_timm.models.pretrained import HUB_ORG
from equivision_timm.weights.publish import models_in_weights_folder, upload, write_publication

__all__ = ["register"]


def register(commands: Parsers) -> None:
    text = "upload weights to the Hub, or write the files of an upload"
    more = """Of each model in the local weights folder, or of a test_* model, whose weights are in the package:
        config, weights and model card, under your login (`hf auth login`). The files that the Hub then returns
        are compared bit by bit. The same command continues a broken upload."""
    parser = add_command(commands, "publish", run, "the same command continues from there", text, more)
    add_names(parser, "every model in the local weights folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write to DIR/NAME.TAG instead of uploading")
    parser.add_argument("--org", default=HUB_ORG, help="user or organisation on the Hub (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="create private repositories")


def run(args: argparse.Namespace) -> int:
    """Publish all models, even if one fails; returns the exit status."""

    def publish(name: str) -> None:
        done = write_publication(name, args.to, args.org) if args.to else upload(name, args.org, args.private)
        print(f"{name}: {done}")

    names = args.names or models_in_weights_folder()
    if not names:
        print("the weights folder is empty: run `python -m equivision_timm fetch --all`", file=sys.stderr)
        return 1
    return for_each(names, publish)
