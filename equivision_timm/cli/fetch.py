"""The command `fetch`: released weights into the local weights folder."""

import argparse
from pathlib import Path

from equivision_timm.cli.options import Parsers, add_names, for_each
from equivision_timm.weights.fetch import fetch
from equivision_timm.weights.released import released

__all__ = ["register"]


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "fetch",
        help="download released weights into the local weights folder",
        description="Downloads released checkpoints (of equivision, ReDet, octic-vits) from Google Drive, converts "
        "them and puts them into the local weights folder ($EQUIVISION_TIMM_WEIGHTS, by default equivision_timm in "
        "the user's cache folder), where create_model(NAME, pretrained=True) finds them. The signs of D4 and D8 "
        "are found on photographs. The same command continues a broken download.",
    )
    add_names(parser, "every model whose checkpoint was released")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=run, interrupted="the same command continues from there")


def run(args: argparse.Namespace) -> int:
    """Fetch all models, even if one fails; returns the exit status."""
    return for_each(args.names or released(), lambda name: fetch(name, args.images, args.signs))
