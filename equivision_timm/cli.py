"""The command line: `python -m equivision_timm COMMAND`, or SCRIPT.py to run one of timm's scripts.

One function a sub-command; the work is done elsewhere.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

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
    _add_fetch(commands)
    _add_publish(commands)
    _add_convert(commands)
    _add_verify(commands)
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
    from equivision_timm.loading import InputError

    try:
        run(args.out)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"demo: interrupted; {args.out} was not written", file=sys.stderr)
        return 130
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


def _add_fetch(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "fetch",
        help="have the original's weights in the local weights folder",
        description="Downloads checkpoints of the original from Google Drive, converts them and puts them into the "
        "local weights folder ($EQUIVISION_TIMM_WEIGHTS, by default equivision_timm in the user's cache folder), where "
        "create_model(NAME, pretrained=True) finds them. The signs of D4 and D8 are found on photographs. The same "
        "call continues a broken download.",
    )
    _add_names(parser, "every model whose checkpoint was released")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from equivision_timm.checkpoints.fetch import fetch
    from equivision_timm.checkpoints.released import released

    return _for_each(args.names or released(), lambda name: fetch(name, args.images, args.signs))


def _add_publish(commands: argparse._SubParsersAction) -> None:
    from equivision_timm.models.pretrained import HUB_ORG

    parser = commands.add_parser(
        "publish",
        help="upload converted weights to the Hub, or write what would be uploaded",
        description="Uploads models of the local weights folder (config, weights, model card) under your own login "
        "(`hf auth login`) and compares what the Hub then returns, bit by bit. The same call continues a broken one.",
    )
    _add_names(parser, "every model in the local weights folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write to DIR/NAME.TAG instead of uploading")
    parser.add_argument("--org", default=HUB_ORG, help="user or organisation on the Hub (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    from equivision_timm.checkpoints.publish import models_in_weights_folder, upload, write_publication

    def publish(name: str) -> None:
        done = write_publication(name, args.to, args.org) if args.to else upload(name, args.org, args.private)
        print(f"{name}: {done}")

    names = args.names or models_in_weights_folder()
    if not names:
        print("the weights folder is empty: run `python -m equivision_timm fetch --all`", file=sys.stderr)
        return 1
    return _for_each(names, publish)


def _add_names(parser: argparse.ArgumentParser, meaning_of_all: str) -> None:
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("names", nargs="*", default=[], metavar="NAME", help="models, e.g. c8resnet50")
    names.add_argument("--all", action="store_true", help=meaning_of_all)


def _for_each(names: Iterable[str], action: Callable[[str], object]) -> int:
    """Do all of them, even where one fails; 1 if one did."""
    return max([_attempt(name, action) for name in names])


def _attempt(name: str, action: Callable[[str], object]) -> int:
    try:
        action(name)
    except Exception as error:  # of the network, the file system, the Hub's client, ...: the other models still count
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint of the original",
        description="Writes DIR/model.safetensors and DIR/config.json, which create_model('local-dir:DIR', "
        "pretrained=True) loads, and prints where the weights come from. A D4 or D8 checkpoint without its kernel "
        "basis is open up to signs, which are found on photographs.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint file of the original network")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model, e.g. c8resnet50")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    import timm

    from equivision_timm.checkpoints.convert_file import convert_file

    if args.model not in timm.list_models(module="equivariant_resnet"):
        print(f"convert: {args.model!r} is no model of this package, e.g. c8resnet50", file=sys.stderr)
        return 2
    try:
        print(convert_file(args.checkpoint, args.model, args.out, args.images, args.signs))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    return 0


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="check weights: hash, origin, values, equivariance, statistics, accuracy",
        description="Prints a table; exit status 1 where a check fails.",
    )
    parser.add_argument("target", metavar="PATH_OR_NAME", help="model folder, safetensors file, or pretrained model")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="labelled images, such as ImageNet's validation set")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    import json

    from equivision_timm.checkpoints.verify import as_json, as_table, verify

    checks = verify(args.target, args.images, args.data)
    result = as_json(checks)
    print(json.dumps(result, indent=1) if args.json else as_table(checks))
    return 0 if result["ok"] else 1
