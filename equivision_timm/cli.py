"""The command line: `python -m equivision_timm COMMAND`, or SCRIPT.py to run one of timm's scripts.

One function a sub-command; the work is done elsewhere.
"""

import argparse
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command, or the script named in its place; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m equivision_timm",
        description="Equivariant image models for timm.",
        epilog="python -m equivision_timm SCRIPT.py ... runs a script of timm with the models registered.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        from equivision_timm.runner import run_script

        run_script(arguments[0], arguments[1:])
        return 0
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
