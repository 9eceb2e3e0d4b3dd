"""The command `list`: the models of this package, their cost, weights and licences."""

import argparse
import fnmatch
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import resolve_pretrained_cfg
from tqdm import tqdm

from equivision_timm.cli.models import check_spec
from equivision_timm.cli.options import Parsers, add_command, add_options, aligned, positive
from equivision_timm.models import Canonicalized, EquivariantBackbone, Symmetrized, model_names
from equivision_timm.models.pretrained import PUBLISHED, WEIGHTS_FILE, local_folder
from equivision_timm.weights.model_card import gmacs
from equivision_timm.weights.released import released

__all__ = ["Row", "list_models", "register"]


@dataclass(frozen=True)
class Row:
    """A model."""

    name: str  # for `timm.create_model`
    group: str  # for example 'c8'
    fields: int  # number of regular fields of the stem
    parameters: int  # their number
    gmacs: float  # 10^9 multiply-accumulates of an image as `fuse` and `export` compute them (adapted: of all views)
    dense_gmacs: float | None  # of a dense network as wide (adapted: of the backbone on one view); None without one
    size: int  # side of that image in pixels, the model's own
    exact_sizes: tuple[int, int]  # the largest exact size up to `--near`, and the smallest from there on
    weights: str  # source of `pretrained=True`; else 'fetch' if that command downloads them, or 'none'
    licence: str  # of these weights; '' without weights


def register(commands: Parsers) -> None:
    text = "the models: size, operations, exact image sizes, weights, licence"
    more = """A row for each model. fields: regular fields of the stem. GMACs: 10^9 multiply-accumulates of one
        image of the size 'at', the model's own, as fuse and export compute them; dense: those of a dense
        network with as many channels (of an adapted model, of its backbone on a single view). exact: image
        sizes at which quarter turns and reflections are exact. weights: the source of create_model(NAME,
        pretrained=True), or 'fetch' if that command downloads them; licence: of these weights."""
    parser = add_command(commands, "list", run, text, more)
    add = parser.add_argument
    add("pattern", nargs="?", default="*", metavar="PATTERN", help="names such as 'c8*' (default: all)")
    add("--near", type=positive, default=224, metavar="N", help="exact sizes near it (default: %(default)s)")
    add_options(parser, "json")


def run(args: argparse.Namespace) -> int:
    """Print the models; returns the exit status."""
    rows = list_models(args.pattern, args.near)
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else _table(rows, args.near))
    return 0


def list_models(pattern: str = "*", near: int = 224) -> list[Row]:
    """The models whose names match a shell pattern, sorted by name; InputError if the name is unknown."""
    names = fnmatch.filter(model_names(), pattern)
    if not names:
        check_spec(pattern)  # a model of timm has no row
    return [_row(name, near) for name in tqdm(names, desc="counting", unit="model", leave=False, delay=5)]


def _row(name: str, near: int) -> Row:
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval().requires_grad_(False)
    size = model.pretrained_cfg["input_size"][-1]
    exact = model.exact_sizes(near) if hasattr(model, "exact_sizes") else (near, near)  # orientation: all
    fields = model.feature_info[0]["num_fields"] if hasattr(model, "feature_info") else 1
    parameters, shape = sum(parameter.numel() for parameter in model.parameters()), (model.in_chans, size, size)
    if isinstance(model, Symmetrized):
        dense = _plain_gmacs(model.backbone.pretrained_cfg["architecture"], shape)
        one = isinstance(model, Canonicalized)  # view
        computed = dense + gmacs(model.orientation, shape, "blocks") if one else dense * model.order
    else:
        dense, computed = _dense(model, name, shape), gmacs(model, shape, "blocks")
    place = _place(name)
    licence = "" if place == "none" else resolve_pretrained_cfg(name).license or "unknown"
    return Row(name, model.group, fields, parameters, computed, dense, size, exact, place, licence)


def _dense(model: nn.Module, name: str, shape: tuple[int, int, int]) -> float | None:
    """10^9 multiply-accumulates of a dense network as wide: with dense filters, or timm's own if it has one."""
    if isinstance(model, EquivariantBackbone):
        return gmacs(model, shape, "dense")
    plain = re.sub(r"^[cd]\d+(hybrid)?|_full", "", name)
    return _plain_gmacs(plain, shape) if plain != name and timm.is_model(plain) else None


@cache  # several adapted models have one backbone
def _plain_gmacs(name: str, shape: tuple[int, int, int]) -> float:
    with torch.device("meta"):
        return gmacs(timm.create_model(name).eval(), shape, "dense")


def _place(name: str) -> str:
    """Where `create_model(name, pretrained=True)` looks, in its order."""
    cfg = resolve_pretrained_cfg(name)
    places = {
        "package": cfg.file,
        "local folder": (local_folder(name) / WEIGHTS_FILE).is_file(),
        "Hub": name in PUBLISHED,
        "timm's Hub": cfg.hf_hub_id,  # of a model of timm, whose weights are adapted
        "fetch": name in released(),
    }
    return next((place for place, found in places.items() if found), "none")


def _table(rows: list[Row], near: int) -> str:
    head = "model", "group", "fields", "params (M)", "GMACs", "dense", "at", f"exact near {near}", "weights", "licence"
    lines: list[tuple[object, ...]] = [head]
    for row in rows:
        sizes = ", ".join(map(str, dict.fromkeys(row.exact_sizes)))
        dense = "-" if row.dense_gmacs is None else _short(row.dense_gmacs)
        figures = row.fields, _short(row.parameters / 1e6), _short(row.gmacs), dense, row.size, sizes
        lines.append((row.name, row.group, *figures, row.weights, row.licence))
    return aligned(lines, left=(0, 1, 8, 9))


def _short(value: float) -> str:
    """Three digits, at least as far as the units."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
