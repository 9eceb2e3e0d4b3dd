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
    _add_rotate_eval(commands)
    _add_show(commands)
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


def _add_rotate_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "rotate-eval",
        help="measure accuracy against the rotation angle, for any timm models",
        description="Top-1, top-5, agreement with the unturned prediction and logit drift at every angle; writes "
        "results.json, results.csv, rotation.png and report.html. The same call continues an interrupted one.",
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME[=CHECKPOINT]", help="timm models, maybe with own weights")
    add("--data", required=True, metavar="DIR", help="folder with one sub-folder of images per class")
    add("--angles", default="0:360:15", help="START:STOP:STEP or A,B,C in degrees (default: %(default)s)")
    add("--out", default="rotate_eval", metavar="DIR", help="folder to write (default: %(default)s)")
    add("--size", dest="sizes", type=int, nargs="+", metavar="N", help="image sizes (default: the model's own)")
    add("--corners", choices=("reflect", "circle"), default="reflect", help="how corners are kept from deciding")
    add("--split", default="validation", help="sub-folder of DIR to look for (default: %(default)s)")
    add("--class-map", default="", metavar="FILE", help="sub-folders in the order of the model's classes")
    add("--unlabelled", action="store_true", help="measure agreement and drift alone: the folders are no classes")
    add("--num-classes", type=int, metavar="N", help="classes of the models (default: their own)")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="images at a time (default: %(default)s)")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images (default: %(default)s)")
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="its type (default: %(default)s)")
    add("--channels-last", action="store_true", help="memory format")
    add("--reparam", action="store_true", help="fold convolutions and norms first")
    parser.set_defaults(run=_rotate_eval)


def _rotate_eval(args: argparse.Namespace) -> int:
    from equivision_timm.loading import InputError
    from equivision_timm.rotate_eval.measure import parse_angles
    from equivision_timm.rotate_eval.run import rotate_eval

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "angles")}
    try:
        rotate_eval(angles=parse_angles(args.angles), **options)
    except InputError as error:
        print(f"rotate-eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"rotate-eval: interrupted; what was measured is in {args.out}, the same command goes on", file=sys.stderr
        )
        return 130
    print(f"{args.out}/report.html")
    return 0


def _add_show(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "show", help="one picture: an image at several angles, the predictions, and the feature maps turning along"
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture file")
    add("--model", dest="models", nargs="+", required=True, metavar="NAME[=CHECKPOINT]", help="timm models")
    add("--angles", default="0,45,90,180", help="START:STOP:STEP or A,B,C in degrees (default: %(default)s)")
    add("--level", type=int, default=1, metavar="N", help="which feature map, 0 being the stem (default: %(default)s)")
    add("--size", type=int, metavar="N", help="image size (default: the model's own)")
    add("--num-classes", type=int, metavar="N", help="classes of the models (default: their own)")
    add("--out", default="equivision_show.png", metavar="FILE", help="picture to write (default: %(default)s)")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    from equivision_timm.loading import InputError
    from equivision_timm.rotate_eval.measure import parse_angles
    from equivision_timm.show import show

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run", "angles")}
    try:
        show(angles=parse_angles(args.angles), **options)
    except InputError as error:
        print(f"show: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0
