"""The command `tune`: measures which strategy of convolution is fastest on this machine, layer by layer."""

import argparse
import json

from timm.models import get_pretrained_cfg

from equivision_timm.cli.models import check_spec
from equivision_timm.cli.options import Parsers, add_command, add_options, aligned
from equivision_timm.layers.strategies.measured import table_file
from equivision_timm.models import EquivariantBackbone
from equivision_timm.models.tune import Setting, Tuning, measure
from equivision_timm.models.variants import create

__all__ = ["as_table", "register"]


def register(commands: Parsers) -> None:
    text = "measure which strategy of convolution is fastest here, layer by layer"
    more = """Measures each convolution with every conv_strategy, then the whole model. If the fastest choices
        win, they are stored in the user's cache folder, where conv_strategy='auto', the default, finds them for
        the same layers and input. The same command continues an interrupted one."""
    parser = add_command(commands, "tune", _run, text, more)
    add = parser.add_argument
    add("name", metavar="MODEL", type=check_spec, help="model of this package, e.g. c8resnet50")
    add_options(parser, "size", "batch-size", "device", batch_size=8)
    add("--amp", choices=("bfloat16", "float16"), default="", help="mixed precision (default: none)")
    add("--channels-last", action="store_true", help="memory format")
    add("--train", action="store_true", help="forward and backward (default: inference)")
    add("--compile", dest="compiled", action="store_true", help="compile the model for its measurement as a whole")


def _run(args: argparse.Namespace) -> int:
    model = create(args.name, EquivariantBackbone).to(args.device)
    cfg = get_pretrained_cfg(args.name)
    side = args.size or model.exact_sizes(near=min(224, cfg.input_size[-1]) if cfg else 224)[1]
    setting = Setting(args.batch_size, (side, side), args.amp, args.channels_last, args.train, args.compiled)
    print(as_table(measure(model, setting)))
    print(f"Measured with {args.batch_size} images of {side} x {side} pixels; stored in {table_file(args.device)}")
    return 0


def as_table(tuning: Tuning) -> str:
    """A line for each convolution, the verdict, and how to use the choice."""
    names = sorted({name for row in tuning.layers.values() for name in row})
    rows = [["layer", *names, "choice"]]
    for layer, row in tuning.layers.items():
        least = min(value for value in row.values() if value is not None)
        cells = [_cell(row[name], least) if name in row else "-" for name in names]
        rows.append([layer, *cells, tuning.choice[layer]])
    lines = [aligned(rows, left=(0, len(names) + 1))]
    if not tuning.seconds:
        return "\n".join([*lines, "\n'auto' already chooses the fastest strategies."])
    auto, expand = (tuning.seconds[name] / tuning.seconds["choice"] for name in ("auto", "expand"))
    whole = f"auto takes {auto:.2f} times, expand {expand:.2f} times the time of these choices"
    lines.append(f"\nThe whole model: {whole}.")
    if tuning.won:
        lines += ["They win. As a mapping for conv_strategy=:", json.dumps(tuning.choice)]
    else:
        lines.append("The gain is too small: 'auto' is not changed.")
    return "\n".join(lines)


def _cell(seconds: float | None, least: float) -> str:
    return "wrong numbers" if seconds is None else f"{1e3 * seconds:.2f} ms ({seconds / least:.2f})"
