"""Translator for checkpoints of equivision (https://github.com/dmklee/equivision).

The bases of C_N and D_1 are the same on every machine; those of D_4 and D_8 differ by signs (`signs.py`). A checkpoint
that holds neither its bases nor its filters leaves them open: `translate` chooses among the known patterns.
"""

import math
from pathlib import Path

import torch

from equivision_timm.data import draw_crops, load_photographs
from equivision_timm.models import EquivariantResNet, model_names
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.models.variants import create
from equivision_timm.weights.checkpoint import Translation
from equivision_timm.weights.escnn_format import translate_resnet
from equivision_timm.weights.signs import parse_signs, sign_groups
from equivision_timm.weights.statistics import Z_LIMIT, Fit, apply_signs, best_fit, choose_signs, fit

__all__ = ["BATCHES", "CLEARLY", "convert_original", "models", "same_shapes", "translate"]

CLEARLY = 0.8  # of the rms of another model
BATCHES = 32  # of crops, at most


def models() -> list[str]:
    """Models whose checkpoints this format holds."""
    return [name for name in model_names(EquivariantResNet) if "reresnet" not in name]


def convert_original(
    state_dict: dict[str, torch.Tensor], model_name: str, signs: str | None = None
) -> dict[str, torch.Tensor]:
    """State dict of a model of this package from that of the same network of equivision.

    Entries that belong to no module keep their names, so that `load_state_dict` refuses them.

    Args:
        state_dict: names of equivision: `conv1.weights`, `layer1.0.bn1.batch_norm_[8].weight`, `fc.bias`, ...
        model_name: the model, e.g. 'c8resnet50'.
        signs: sign pattern of the machine of the training, for D_4 and D_8 checkpoints without basis and filters: a
            name of `known_patterns` or a string of '+' and '-'. None takes the coefficients as they are.

    Raises:
        WeightsError: the entries do not fit the model, or are damaged.
        InputError: `signs` is not a pattern of this group.

    Example:
        >>> convert_original({"fc.bias": torch.zeros(1000)}, "c4resnet18")
        Traceback (most recent call last):
        equivision_timm.models.pretrained.WeightsError: the entry conv1.weights is missing
    """
    return _convert(state_dict, model_name, signs).state_dict


def _convert(state_dict: dict[str, torch.Tensor], model_name: str, signs: str | None) -> Translation:
    with torch.device("meta"):
        model = create(model_name, EquivariantResNet)
    return translate_resnet(state_dict, model, signs)


def translate(
    state_dict: dict[str, torch.Tensor], model_name: str, images: str | Path | None = None, signs: str | None = None
) -> Translation:
    """`convert_original`; what coefficients leave open, signs and models of the same shapes, is decided on photographs.

    They are those in `images`, by default scikit-image's.

    Raises:
        WeightsError: the entries do not fit the model, or the statistics fit another model.
        AmbiguousSigns: no known pattern is clearly the best.
        ModuleNotFoundError: photographs are needed, and scikit-image is not installed.
    """
    found = _convert(state_dict, model_name, signs)
    if found.notes["basis_from"] != "coefficients":
        return found
    model, notes = _load(model_name, found.state_dict), dict(found.notes)
    photographs = load_photographs(images)
    crops, rival = draw_crops(photographs), same_shapes(model_name)
    of_rival = best_fit(_load(rival, convert_original(state_dict, rival)), crops) if rival else None
    if signs is not None:
        notes |= {"signs": parse_signs(model.group, signs), "signs_given": "by the user"}
    elif sign_groups(model.group):
        if of_rival:
            _lead(model_name, best_fit(model, crops), rival, of_rival, is_needed=False)
        choice = choose_signs(model, (draw_crops(photographs, seed=seed) for seed in range(BATCHES)))
        apply_signs(model, choice["signs"])
        notes |= choice
    own = fit(model, crops)
    if not math.isfinite(own.rms):
        raise WeightsError(f"the batch norms of {model_name} overflow on photographs: the file is damaged")
    notes["statistics"] = f"log variances off by {own.rms:.2g} on {len(crops)} crops of photographs"
    if of_rival:
        lead = _lead(model_name, own, rival, of_rival, is_needed=signs is None)
        notes[f"better_than_{rival}"] = f"{lead:.1f} standard errors"
    return Translation(dict(model.state_dict()), notes=notes)


def same_shapes(model_name: str) -> str:
    """The other model with the same names and shapes, since D_4 and C_8 have the same order; '' if there is none."""
    pairs = {"c8resnet": "d4resnet", "d4resnet": "c8resnet"}
    others = (model_name.replace(group, other) for group, other in pairs.items() if group in model_name)
    return next((name for name in others if name in models()), "")


def _load(model_name: str, state_dict: dict[str, torch.Tensor]) -> EquivariantResNet:
    model = create(model_name, EquivariantResNet)
    model.load_state_dict(state_dict)
    return model


def _lead(name: str, own: Fit, rival: str, other: Fit, is_needed: bool) -> float:
    """Vuong's z of a model over another one of the same shapes.

    The better one needs a lead of `Z_LIMIT` standard errors and at most `CLEARLY` times the rms of the other: random
    weights give C_8 a lead of up to 2.6 over D_4 on forty crops, with 0.92 to 0.98 of its rms.

    Raises:
        WeightsError: the other model is better, or this one is not although that `is_needed`.
    """
    lead, fault = own.lead(other), ""
    if lead <= -Z_LIMIT and other.rms <= CLEARLY * own.rms:
        fault = f"fit {rival}: convert it as {rival}"
    elif is_needed and not (lead >= Z_LIMIT and own.rms <= CLEARLY * other.rms):
        fault = "do not decide: give photographs like those of its training (--images DIR), or a file with its basis"
    if fault:
        raise WeightsError(
            f"{name} and {rival} have the same names and shapes, and the batch-norm statistics of this checkpoint "
            f"(log variances off by {own.rms:.2g} and {other.rms:.2g}, {abs(lead):.1f} standard errors apart) {fault}"
        )
    return lead
