"""The command line: `equivision-timm COMMAND` or `python -m equivision_timm COMMAND`, or SCRIPT.py for one of timm's.

One function a sub-command; the work is done elsewhere.
"""

import argparse
import difflib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from equivision_timm.arguments import InputError, one_line
from equivision_timm.starting import CONSOLE_SCRIPT

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command, or the script named in its place.

    Returns:
        The exit status: 0; 1 where the work failed or a check of `verify` did; 2 where what was given cannot be used;
        130 after Ctrl-C. All but 0 come with one line on stderr; `python -X dev` shows the traceback as well. The
        errors of a script pass through.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    typed = shlex.join([*_program().split(), *arguments])
    args, label = argparse.Namespace(interrupted="nothing was done", typed=typed), "equivision_timm"
    try:
        parser, commands = _parser()
        if not first or first.startswith("-") or first in commands.choices:
            label = first if first in commands.choices else label
            parser.parse_args(arguments, args)
            _prepare_output()
            status = args.run(args)
            sys.stdout.flush()  # here, so that a pipe closed early is noticed here
            return status
        _check_command(first, commands.choices)
        run_script = _script_runner(first)
    except (Exception, KeyboardInterrupt) as error:
        return _report(label, error, args)
    run_script(first, arguments[1:])
    return 0


def _prepare_output() -> None:
    """Let stdout write out what its encoding lacks, as stderr does; raises InputError where it is closed."""
    if sys.stdout is None:
        raise InputError("standard output is closed: leave it open, or send it to a file")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _check_command(word: str, commands: Iterable[str]) -> None:
    """Raises InputError where `word` is a command with a slip: no script of timm's, but near the name of a command."""
    near = difflib.get_close_matches(word.lower().replace("_", "-"), commands, n=1)
    if near and not word.endswith(".py") and not os.path.exists(word):
        raise InputError(f"there is no command {word!r}: did you mean {near[0]!r}? (see {_program()} --help)")


def _program() -> str:
    """How the user calls it."""
    name = Path(sys.argv[0]).stem if sys.argv else ""
    return name if name == CONSOLE_SCRIPT else "python -m equivision_timm"


def _script_runner(script: str) -> Callable[[str, list[str]], None]:
    from equivision_timm.cli.runner import check_script, run_script

    check_script(script)
    return run_script


def _report(label: str, error: BaseException, args: argparse.Namespace) -> int:
    """Say on one line of stderr what ended a command; its exit status."""
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough; Python would complain once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        print(f"{label}: interrupted; {one_line(args.interrupted.format(**vars(args)))}", file=sys.stderr)
        return 130
    if sys.flags.dev_mode and not isinstance(error, InputError):
        raise error
    print(f"{label}: {_message(error)}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def _message(error: BaseException) -> str:
    """The error as one line; with its type where the words alone say too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if any(line.startswith("Traceback") for line in lines) else " ".join(lines)
    explained = isinstance(error, (ValueError, OSError, ModuleNotFoundError)) or text == type(error).__name__
    return one_line(text if explained else f"{type(error).__name__}: {text}")


class _Parser(argparse.ArgumentParser):
    """Leaves the telling of errors to `main`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Prints the versions, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> NoReturn:
        import timm
        import torch

        import equivision_timm
        from equivision_timm.layers.strategies import native_library

        print(f"equivision_timm {equivision_timm.__version__}, timm {timm.__version__}, torch {torch.__version__}")
        print(f"conv_strategy 'native': {native_library.describe()}")
        parser.exit()


def _parser() -> tuple[_Parser, argparse._SubParsersAction]:
    parser = _Parser(
        prog=_program(),
        description="Equivariant image models for timm.",
        epilog=f"{_program()} SCRIPT.py ... runs a script of timm with the models registered.",
    )
    parser.add_argument(
        "--version",
        action=_Version,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        nargs=0,
        help="print the versions, also of timm and PyTorch",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_list(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_rotate_eval(commands)
    _add_show(commands)
    _add_tune(commands)
    _add_fetch(commands)
    _add_publish(commands)
    _add_convert(commands)
    _add_verify(commands)
    return parser, commands


def _options(args: argparse.Namespace) -> dict:
    """What was given, without what `main` needs."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run", "interrupted", "typed")}


def _check_drawing() -> None:
    """Raises InputError where matplotlib is not installed, which only the commands that draw need."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"pictures are drawn by matplotlib ({error}): pip install 'equivision-timm[tools]'") from error


def _add_batches(parser: argparse.ArgumentParser, size: int) -> None:
    """How many images to compute at a time, and where."""
    add = parser.add_argument
    add("-b", "--batch-size", type=int, default=size, metavar="N", help="images at a time (default: %(default)s)")
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="classify rotated digits with an equivariant model and its plain twin")
    parser.add_argument("--out", default="equivision_demo.png", help="picture to write (default: %(default)s)")
    parser.set_defaults(run=_demo, interrupted="{out} was not written")


def _demo(args: argparse.Namespace) -> int:
    _check_drawing()
    from equivision_timm.cli.demo import run

    run(args.out)
    return 0


def _add_list(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "list",
        help="the models: size, cost, exact image sizes, where their weights are",
        description="Fields of the stem, parameters, multiply-accumulates (GMACs) of one 224 x 224 image, or of the "
        "model's own size where it differs, image sizes at which quarter turns and mirrors are exact, and the place "
        "from which create_model(NAME, pretrained=True) takes weights, or `fetch` where that command gets them.",
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names such as 'c8*' (default: all)")
    parser.add_argument("--near", type=int, default=224, metavar="N", help="exact sizes near it (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=_list, interrupted="not all was counted")


def _list(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from equivision_timm.cli.list_models import as_table, list_models

    rows = list_models(args.pattern, args.near)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else as_table(rows, args.near))
    return 0


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict",
        help="the most probable classes of image files",
        description="Writes the most probable classes of each image. Files that cannot be read are named and left out; "
        "the exit status is then 1. Checkpoints of timm's train.py bring their number of classes, image size and "
        "normalisation along.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE|DIR", help="files, or folders of them at any depth")
    add("--model", required=True, metavar="NAME[=CHECKPOINT]", help="timm model, maybe with own weights")
    add("--class-map", type=Path, metavar="FILE|DIR", help="names of the classes, one a line, or the training folder")
    add("--topk", type=int, metavar="K", help="how many classes of each image (default: 5, or all of fewer)")
    add("--format", choices=("csv", "json"), default="csv", help="what to write (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="file to write (default: print)")
    add("--size", type=int, metavar="N", help="image size (default: that of the checkpoint's training, or the model's)")
    _add_batches(parser, 32)
    parser.set_defaults(run=_predict, interrupted="nothing was written")


def _predict(args: argparse.Namespace) -> int:
    from equivision_timm.cli.predict import predict

    return 0 if predict(**_options(args)) else 1


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="a model as an ONNX file, checked against the model",
        description="Writes a classifier as an ONNX file of standard operators, block diagonal where that costs less: "
        "images [batch, channels, N, N] -> logits [batch, classes]. Its metadata say how images are to be prepared and "
        "what the classes are called. onnxruntime must give the logits of the model, else nothing is written.",
    )
    add = parser.add_argument
    add("model", metavar="NAME[=CHECKPOINT]", help="timm model, maybe with own weights")
    add("out", type=Path, metavar="FILE", help="ONNX file to write")
    add("--size", type=int, metavar="N", help="image size (default: that of the checkpoint's training, or the model's)")
    add("--class-map", type=Path, metavar="FILE|DIR", help="names of the classes, one a line, or the training folder")
    parser.set_defaults(run=_export, interrupted="{out} was not written")


def _export(args: argparse.Namespace) -> int:
    from equivision_timm.cli.export import export

    done = export(**_options(args))
    print(f"{one_line(str(args.out))}: {done.megabytes:.1f} MB, logits within {done.error:.0e} of the model's")
    print(f"rotated by 90 degrees at {done.size} pixels they change by {done.turned:.0e} of the largest", end="")
    print(f"; --size {' or '.join(map(str, done.exact_sizes))} is exact" if done.exact_sizes else "")
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
    add(
        "--size",
        dest="sizes",
        type=int,
        nargs="+",
        metavar="N",
        help="image sizes (default: as trained, or the model's)",
    )
    add("--corners", choices=("reflect", "circle"), default="reflect", help="how corners are kept from deciding")
    add("--split", default="validation", help="sub-folder of DIR to look for (default: %(default)s)")
    add("--class-map", default="", metavar="FILE", help="sub-folders in the order of the model's classes")
    add("--unlabelled", action="store_true", help="measure agreement and drift alone: the folders are no classes")
    add("--num-classes", type=int, metavar="N", help="classes of the models (default: as trained, or the model's)")
    _add_batches(parser, 256)
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images (default: %(default)s)")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="its type (default: %(default)s)")
    add("--channels-last", action="store_true", help="memory format")
    add("--reparam", action="store_true", help="fold convolutions and norms first")
    add("--by-stage", action="store_true", help="also measure how far the maps of each stage turn with the image")
    add("--test-time-turns", type=int, default=1, metavar="N", help="average the logits over N rotations, 1, 2 or 4")
    parser.set_defaults(
        run=_rotate_eval, interrupted="what was measured is in {out}, the same command goes on from there"
    )


def _rotate_eval(args: argparse.Namespace) -> int:
    _check_drawing()
    from equivision_timm.cli.rotate_eval.measure import parse_angles
    from equivision_timm.cli.rotate_eval.run import rotate_eval

    rotate_eval(**{**_options(args), "angles": parse_angles(args.angles), "command": args.typed})
    print(one_line(f"{args.out}/report.html"))
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
    add("--size", type=int, metavar="N", help="image size (default: as trained, or the model's)")
    add("--num-classes", type=int, metavar="N", help="classes of the models (default: as trained, or the model's)")
    add("--out", default="equivision_show.png", metavar="FILE", help="picture to write (default: %(default)s)")
    parser.set_defaults(run=_show, interrupted="{out} was not written")


def _show(args: argparse.Namespace) -> int:
    _check_drawing()
    from equivision_timm.cli.rotate_eval.measure import parse_angles
    from equivision_timm.cli.show import show

    show(**{**_options(args), "angles": parse_angles(args.angles)})
    print(one_line(args.out))
    return 0


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which way to convolve is fastest here, layer by layer",
        description="Measures each convolution of a model by every conv_strategy, then the model as a whole. Choices "
        "that win are kept in the user's cache folder, where conv_strategy='auto', the default, finds them for the "
        "same layers and input. The same call continues an interrupted one.",
    )
    add = parser.add_argument
    add("name", metavar="MODEL", help="model of this package, e.g. c8resnet50")
    add("--size", type=int, metavar="N", help="image size (default: the exact size near 224)")
    _add_batches(parser, 8)
    add("--amp", choices=("bfloat16", "float16"), default="", help="mixed precision (default: none)")
    add("--channels-last", action="store_true", help="memory format")
    add("--train", action="store_true", help="forward and backward (default: inference)")
    add("--compile", dest="compiled", action="store_true", help="compile the model where it is measured as a whole")
    parser.set_defaults(
        run=_tune, interrupted="the layers measured so far are kept, the same command goes on from there"
    )


def _tune(args: argparse.Namespace) -> int:
    from equivision_timm.cli.tune import run

    run(**_options(args))
    return 0


def _add_fetch(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "fetch",
        help="have released weights in the local weights folder",
        description="Downloads released checkpoints (of equivision, ReDet, octic-vits) from Google Drive, converts "
        "them and puts them into the local weights folder ($EQUIVISION_TIMM_WEIGHTS, by default equivision_timm in "
        "the user's cache folder), where create_model(NAME, pretrained=True) finds them. The signs of D4 and D8 "
        "are found on photographs. The same call continues a broken download.",
    )
    _add_names(parser, "every model whose checkpoint was released")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=_fetch, interrupted="the same command goes on from there")


def _fetch(args: argparse.Namespace) -> int:
    from equivision_timm.weights.fetch import fetch
    from equivision_timm.weights.rooms import released

    return _for_each(args.names or released(), lambda name: fetch(name, args.images, args.signs))


def _add_publish(commands: argparse._SubParsersAction) -> None:
    from equivision_timm.models.pretrained import HUB_ORG

    parser = commands.add_parser(
        "publish",
        help="upload weights to the Hub, or write what would be uploaded",
        description="Uploads models of the local weights folder, or by name tiny test_* models, whose weights the "
        "package carries, each as config, weights and model card, under your own login "
        "(`hf auth login`) and compares what the Hub then returns, bit by bit. The same call continues a broken one.",
    )
    _add_names(parser, "every model in the local weights folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write to DIR/NAME.TAG instead of uploading")
    parser.add_argument("--org", default=HUB_ORG, help="user or organisation on the Hub (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.set_defaults(run=_publish, interrupted="the same command goes on from there")


def _publish(args: argparse.Namespace) -> int:
    from equivision_timm.weights.publish import models_in_weights_folder, upload, write_publication

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
    """Do all of them, even where one fails, 1 if one did; what is wrong for all of them ends it: an InputError."""
    return max([_attempt(name, action) for name in names])


def _attempt(name: str, action: Callable[[str], object]) -> int:
    try:
        action(name)
    except InputError:
        raise
    except Exception as error:  # of the network, the file system, the Hub's client, ...: the other models still count
        print(f"{one_line(name)}: {type(error).__name__}: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a foreign checkpoint",
        description="Writes DIR/model.safetensors and DIR/config.json, which create_model('local-dir:DIR', "
        "pretrained=True) loads, and prints where the weights come from. A D4 or D8 checkpoint without its kernel "
        "basis is open up to signs, which are found on photographs.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="checkpoint file of equivision, ReDet or octic-vits"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="the model, e.g. c8resnet50")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    parser.add_argument("--signs", metavar="PATTERN", help="sign pattern of D4 or D8, by name or as '+' and '-'")
    parser.set_defaults(run=_convert, interrupted="nothing was written to {out}")


def _convert(args: argparse.Namespace) -> int:
    from equivision_timm.weights.rooms import convert_file

    print(convert_file(args.checkpoint, args.model, args.out, args.images, args.signs))
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
    parser.set_defaults(run=_verify, interrupted="not all was checked")


def _verify(args: argparse.Namespace) -> int:
    import json

    from equivision_timm.weights.verify import as_json, as_table, verify

    if Path(args.target).suffix in (".pth", ".pt", ".tar", ".ckpt", ".bin"):
        raise InputError(
            f"{args.target!r} is a checkpoint of training, and verify checks model folders and safetensors files. For "
            f"the accuracy run timm's validate.py --model NAME --checkpoint {args.target} --data-dir DIR; under "
            f"rotation, rotate-eval --models NAME={args.target} --data DIR; for predictions, predict IMAGE --model "
            f"NAME={args.target}; an original checkpoint: convert {args.target} --model NAME --out DIR, then verify DIR"
        )
    checks = verify(args.target, args.images, args.data)
    result = as_json(checks)
    print(json.dumps(result, indent=1) if args.json else as_table(checks))
    return 0 if result["ok"] else 1
