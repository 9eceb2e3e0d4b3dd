"""The command `fetch`: released weights into the local weights folder."""

import argparse

from equivision_timm.cli.options import Parsers, add_command, add_names, add_options, for_each
from equivision_timm.weights.fetch import fetch
from equivision_timm.weights.released import released

__all__ = ["register"]


def register(commands: Parsers) -> None:
    text = "download released weights into the local weights folder"
    more = """Downloads checkpoints of equivision, ReDet and octic-vits from Google Drive, and converts them.
        The weights folder is $EQUIVISION_TIMM_WEIGHTS, by default equivision_timm in the user's cache folder;
        create_model(NAME, pretrained=True) loads from it. The same command continues a broken download."""
    parser = add_command(commands, "fetch", run, "the same command continues from there", text, more)
    add_names(parser, "every model whose checkpoint was released")
    add_options(parser, "images", "signs")


def run(args: argparse.Namespace) -> int:
    """Fetch all models, even if one fails; returns the exit status."""
    return for_each(args.names or released(), lambda name: fetch(name, args.images, args.signs))
