"""The command `verify`: checks of weights that are about to be used or published, one row each."""

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import resolve_pretrained_cfg

from equivision_timm.cli.options import Parsers, add_command, add_options, aligned
from equivision_timm.data import load_crops
from equivision_timm.files import file_sha256
from equivision_timm.groups import Group
from equivision_timm.models import EquivariantResNet, EquivariantViT, Symmetrized
from equivision_timm.models.pretrained import TENSORS_SHA256
from equivision_timm.testing import equivariance_error
from equivision_timm.weights.folder import Loaded, load_strictly
from equivision_timm.weights.statistics import fit

__all__ = ["Check", "register", "verify"]

_SIZE = 97  # of the images on which equivariance is measured, or the next exact one
_TOLERANCE = 1e-4


def register(commands: Parsers) -> None:
    text = "check weights: hash, origin, values, equivariance, statistics"
    more = """Prints a table with a row for each check; the exit status is 1 if one fails. timm's validate.py measures
        the accuracy, with --model local-dir:DIR."""
    parser = add_command(commands, "verify", run, text, more)
    parser.add_argument("target", metavar="PATH_OR_NAME", help="model folder, safetensors file, or pretrained model")
    add_options(parser, "images", "json")


def run(args: argparse.Namespace) -> int:
    """Print the checks; returns the exit status."""
    checks = verify(args.target, args.images)
    passed = all(check.ok is not False for check in checks)
    if args.json:
        print(json.dumps({"ok": passed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        words = {True: "ok", False: "FAILED", None: "-"}
        print(aligned([[check.name, words[check.ok], check.finding] for check in checks], left=(0, 1, 2)))
    return 0 if passed else 1


@dataclass(frozen=True)
class Check:
    """One row: name, result (None: reported only), finding."""

    name: str
    ok: bool | None
    finding: str


def verify(target: str, images: str | Path | None = None) -> list[Check]:
    """All rows for a model folder, a safetensors file, or a pretrained model; it passes if no `ok` is False.

    The batch-norm statistics are compared on photographs in `images`, by default those of scikit-image.
    """
    try:
        loaded = load_strictly(target)
    except Exception as error:  # of timm, torch, safetensors, huggingface_hub, json
        return [Check("loads", False, f"{type(error).__name__}: {str(error).strip() or target}")]
    return [
        Check("loads", True, f"{loaded.name}, every entry{' as hashed' * (TENSORS_SHA256 in loaded.provenance)}"),
        Check("sha256", None, file_sha256(loaded.weights)),
        *(Check(key, None, value) for key, value in loaded.provenance.items()),
        _preprocessing(loaded),
        _equivariance(loaded.model),
        _statistics(loaded.model, images),
    ]


def _preprocessing(loaded: Loaded) -> Check:
    """Preprocessing in the config; that of converted weights is known."""
    found = resolve_data_config({}, model=loaded.model)
    known = resolve_data_config({}, pretrained_cfg=resolve_pretrained_cfg(loaded.name).to_dict())
    differ = [f"{key} {found[key]}" for key in known if json.dumps(found[key]) != json.dumps(known[key])]
    finding = f"{', '.join(differ)}, unlike that of the architecture" if differ else "that of the architecture"
    return Check("preprocessing", not differ if "source_sha256" in loaded.provenance else None, finding)


def _equivariance(model: Any) -> Check:
    """Of the logits, or of the maps if the classifier reads the group axis."""
    group, invariant = Group.from_name(model.group), True
    if isinstance(model, Symmetrized):
        if not model.has_head or getattr(model, "gate", 0.0) > 0:
            return Check("equivariance", None, "not checked: of an adapted model only with a head and without a gate")
        cfg: Any = model.pretrained_cfg
        size = cfg["input_size"][-1]
    else:
        invariant, (_, size) = model.is_invariant, model.exact_sizes(_SIZE)
    if not invariant and isinstance(model, EquivariantViT):
        return Check("equivariance", None, "not checked: neither logits nor last maps of a hybrid are invariant")
    if not invariant:
        model = copy.deepcopy(model)
        model.reset_classifier(0, "")
    try:
        errors = equivariance_error(model, size, output_type="invariant" if invariant else "regular")
    except ValueError as error:
        return Check("equivariance", False, str(error))
    worst = max(errors[g] for g in group.grid_elements)
    finding = (
        f"{worst:.1e} of the {'logits' if invariant else 'maps'} at {size} x {size} pixels, rotations by 90 degrees "
        f"and reflections in {group.name} (at most {_TOLERANCE:.0e})"
    )
    return Check("equivariance", worst <= _TOLERANCE, finding)


def _statistics(model: nn.Module, images: str | Path | None) -> Check:
    """Running variances against those on photographs."""
    if not isinstance(model, EquivariantResNet) or model.in_chans != 3:
        return Check("statistics", None, "not checked: known for ResNets of RGB images only")
    try:
        crops = load_crops(images)
    except ModuleNotFoundError as error:
        return Check("statistics", None, f"not checked: {error}, give --images DIR")
    except (OSError, ValueError) as error:
        return Check("statistics", False, str(error))
    found = fit(model, crops)
    finding = f"log(variance on {len(crops)} crops / running variance): {found.rms:.2g} rms"
    return Check("statistics", None if found.rms < float("inf") else False, finding)
