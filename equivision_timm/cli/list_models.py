"""The command `list`: the models of this package, their cost, and where their weights are."""

import argparse
import difflib
import fnmatch
import json
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import resolve_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.cli.options import Parsers, integer
from equivision_timm.errors import InputError
from equivision_timm.models import Canonicalized, Symmetrized, fuse, model_names
from equivision_timm.models.pretrained import PUBLISHED, WEIGHTS_FILE, local_folder
from equivision_timm.weights.released import released

__all__ = ["Row", "list_models", "register"]


@dataclass(frozen=True)
class Row:
    """A model."""

    name: str  # what `timm.create_model` takes
    group: str  # for example 'c8'
    fields: int  # number of regular fields of the stem
    parameters: int  # their number
    gmacs: float  # 10^9 multiply-accumulates of one image, by PyTorch's flop counter, with dense filters
    size: int  # side of that image in pixels, the model's own
    exact_sizes: tuple[int, int]  # the largest exact size up to `--near`, and the smallest from there on
    # where `pretrained=True` finds them: 'package', 'local folder' or 'Hub'; else 'fetch' if that command gets them,
    # or 'none'
    weights: str


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "list",
        help="the models: size, cost, exact image sizes, where their weights are",
        description="Fields of the stem, parameters, multiply-accumulates (GMACs) of one 224 x 224 image, or of the "
        "model's own size if it differs, image sizes at which quarter turns and mirrors are exact, and the place "
        "from which create_model(NAME, pretrained=True) takes weights, or `fetch` if that command gets them.",
    )
    add = parser.add_argument
    add("pattern", nargs="?", default="*", metavar="PATTERN", help="names such as 'c8*' (default: all)")
    add("--near", type=integer(1, 8192), default=224, metavar="N", help="exact sizes near it (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=run, interrupted="not all was counted")


def run(args: argparse.Namespace) -> int:
    """Print the models; returns the exit status."""
    rows = list_models(args.pattern, args.near)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else _table(rows, args.near))
    return 0


def list_models(pattern: str = "*", near: int = 224) -> list[Row]:
    """The models whose names match a shell pattern, sorted by name.

    Raises:
        InputError: no model matches, or images of `near` pixels are too small for one.
    """
    names = fnmatch.filter(model_names(), pattern)
    if not names:
        close = difflib.get_close_matches(pattern.strip("*"), model_names(), n=3)
        raise InputError(f"no model is called {pattern!r}: did you mean {', '.join(close) or 'c8*'}?")
    return [_row(name, near) for name in names]


def _row(name: str, near: int) -> Row:
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval().requires_grad_(False)
    size = model.pretrained_cfg["input_size"][-1]
    try:
        exact = model.exact_sizes(near) if hasattr(model, "exact_sizes") else (near, near)  # adapted models: all sizes
    except ValueError as error:
        raise InputError(f"--near {near} is not possible for {name}: {error}") from error
    fields = model.feature_info[0]["num_fields"] if hasattr(model, "feature_info") else 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    networks = [(model, 1)]
    if isinstance(model, Symmetrized):  # the backbone runs once for each element of the group
        networks = [(model.backbone, model.order)]
    elif isinstance(model, Canonicalized):
        networks = [(model.backbone, 1), (model.orientation, 1)]
    gmacs = sum(times * _gmacs(network, model.in_chans, size) for network, times in networks)
    return Row(name, model.group, fields, parameters, gmacs, size, exact, _place(name))


def _gmacs(network: nn.Module, channels: int, size: int) -> float:
    """10^9 multiply-accumulates of one image, with dense filters; the network is on the meta device."""
    plain = fuse(network, "dense")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


def _place(name: str) -> str:
    """Where `create_model(name, pretrained=True)` looks, in its order."""
    cfg = resolve_pretrained_cfg(name)
    if cfg.file:
        return "package"
    if (local_folder(name) / WEIGHTS_FILE).is_file():
        return "local folder"
    if name in PUBLISHED:
        return "Hub"
    if cfg.hf_hub_id:  # of a model of timm, whose weights are adapted
        return f"timm's Hub, {cfg.license}"
    return "fetch" if name in released() else "none"


def _table(rows: list[Row], near: int) -> str:
    head = ("model", "group", "fields", "params (M)", "GMACs", "at", f"exact near {near}", "weights")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        exact = ", ".join(map(str, dict.fromkeys(row.exact_sizes)))
        figures = (str(row.fields), f"{row.parameters / 1e6:.2f}", f"{row.gmacs:.2f}", str(row.size), exact)
        lines.append((row.name, row.group, *figures, row.weights))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(
        f"{{:{'<' if head[i] in ('model', 'group', 'weights') else '>'}{w}}}" for i, w in enumerate(widths)
    )
    return "\n".join(form.format(*line).rstrip() for line in lines)
