"""Translator for checkpoints of equivision (https://github.com/dmklee/equivision).

The bases of C_N and D_1 are the same on every machine; those of D_4 and D_8 differ by signs (`signs.py`). A checkpoint
that holds neither its bases nor its filters leaves them open: `translate` chooses among the known patterns.
"""

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
    pattern = None if signs is None else parse_signs(model.group, signs)
    found = translate_resnet(state_dict, model)
    basis = found.notes["basis_from"]
    if sign_groups(model.group) and "coefficients" in basis and "+" in basis:
        raise WeightsError("only some convolutions of the checkpoint have a sampled_basis or filter: save all or none")
    if pattern is None:
        return found
    if basis != "coefficients":
        raise WeightsError(f"the checkpoint holds its basis ({basis}): leave signs out")
    model.load_state_dict(found.state_dict, assign=True)
    apply_signs(model, pattern)
    return Translation(dict(model.state_dict()), notes=found.notes)


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
    model, notes = create(model_name, EquivariantResNet), dict(found.notes)
    model.load_state_dict(found.state_dict)
    rivals = {name: create(name, EquivariantResNet) for name in same_shapes(model_name)}
    for rival in rivals.values():
        rival.load_state_dict(convert_original(state_dict, model_name))
    photographs = load_photographs(images)
    crops = draw_crops(photographs)
    if signs is not None:
        notes |= {"signs": parse_signs(model.group, signs), "signs_given": "by the user"}
    elif sign_groups(model.group):
        if rivals:
            _check_statistics(model_name, best_fit(model, crops), rivals, crops, decided=True)
        choice = choose_signs(model, (draw_crops(photographs, seed=seed) for seed in range(BATCHES)))
        apply_signs(model, choice.signs)
        notes |= {
            "signs": choice.signs,
            "signs_known_as": choice.name,
            "runner_up": choice.runner_up,
            "separation": f"{choice.separation:.1f} standard errors on {choice.crops} crops",
            "known_misfits": ", ".join(f"{name} {misfit:.4g}" for name, misfit in choice.misfits.items()),
        }
    notes |= _check_statistics(model_name, fit(model, crops), rivals, crops, decided=signs is not None)
    return Translation(dict(model.state_dict()), notes=notes)


def same_shapes(model_name: str) -> list[str]:
    """Other models with the same names and shapes: D_4 and C_8 have the same order."""
    pairs = {"c8resnet": "d4resnet", "d4resnet": "c8resnet"}
    others = [model_name.replace(group, other) for group, other in pairs.items() if group in model_name]
    return [name for name in others if name in models()]


def _check_statistics(
    name: str, own: Fit, rivals: dict[str, EquivariantResNet], images: torch.Tensor, decided: bool
) -> dict[str, str]:
    """Compare the fit of a model to its running variances with that of models of the same shapes; notes for people.

    A decision needs a lead of `Z_LIMIT` standard errors and at most `CLEARLY` times the rms of the other: random
    weights give C_8 a lead of up to 2.6 over D_4 on forty crops, with 0.92 to 0.98 of its rms. With `decided`, only a
    model that is clearly better is refused.
    """
    if not own.is_finite:
        raise WeightsError(f"the activations of this {name} checkpoint are not finite on photographs: it is damaged")
    notes = {"statistics": f"log variances off by {own.rms:.2g} on {len(images)} crops of photographs"}
    for rival, network in rivals.items():
        other = best_fit(network, images)
        lead = own.lead(other)
        figures = f"log variances off by {own.rms:.2g} and {other.rms:.2g}, {abs(lead):.1f} standard errors apart"
        fault = ""
        if other.is_finite and lead <= -Z_LIMIT and other.rms <= CLEARLY * own.rms:
            fault = (
                f"this is not a checkpoint of {name}: its batch-norm statistics fit {rival}, which has the same names "
                f"and shapes ({figures}): convert it as {rival}"
            )
        elif not decided and not (lead >= Z_LIMIT and own.rms <= CLEARLY * (other.rms if other.is_finite else 1e30)):
            fault = (
                f"{name} and {rival} have the same names and shapes, and the batch-norm statistics of this checkpoint "
                f"do not decide between them ({figures}; {Z_LIMIT:.0f} and a ratio of {CLEARLY} are needed): give "
                "photographs like those of its training (--images DIR), or a checkpoint with its basis"
            )
        if fault:
            raise WeightsError(fault)
        notes[f"better_than_{rival}"] = f"{lead:.1f} standard errors"
    return notes
