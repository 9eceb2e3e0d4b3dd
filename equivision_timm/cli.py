"""The command line: `python -m equivision_timm COMMAND`. One function a sub-command; the work is done elsewhere."""

import argparse

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m equivision_timm", description="Equivariant image models for timm.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="classify rotated digits with an equivariant model and its plain twin")
    parser.add_argument("--out", default="equivision_demo.png", help="picture to write (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from equivision_timm.demo import run

    run(args.out)
    return 0
