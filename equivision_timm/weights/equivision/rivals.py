"""Is a checkpoint one of the model it is said to be? Its own batch-norm statistics answer.

D_4 and C_8 have the same order, and their models the same names and shapes: a checkpoint without its basis, read as the
wrong one of the two, is a network that computes something else. The running variances are those of the right network's
activations, so it reproduces them on photographs and the other does not (`signs.py` says how that is measured).

Two things are needed to tell: a lead of `Z_LIMIT` standard errors, and at most `CLEARLY` times the other's deviations.
A lead alone is not enough, for the groups differ by themselves: whatever the truth is, C_8 reproduces the statistics of
random weights a little better than D_4, by up to 2.6 standard errors on forty crops, and by 0.92 to 0.98 in size.
"""

from dataclasses import dataclass

import torch

from equivision_timm.models import EquivariantResNet
from equivision_timm.models.variants import create
from equivision_timm.weights.equivision.signs import Z_LIMIT, Fit, best_fit, fit_as_it_stands

__all__ = ["CLEARLY", "Statistics", "check_before_search", "check_statistics"]


CLEARLY = 0.8  # of the rms of log variances


@dataclass(frozen=True)
class Statistics:
    """How well the running statistics of a network are reproduced on photographs.

    Attributes:
        rms: of r = log(batch variance / running variance), less its median over each layer, over all fields.
        crops: on how many crops.
        leads: by how many standard errors (Vuong's z) the model is better than each other one that it could be.
    """

    rms: float
    crops: int
    leads: dict[str, float]


def check_before_search(
    name: str, state_dict: dict[str, torch.Tensor], rivals: dict[str, dict[str, torch.Tensor]], images: torch.Tensor
) -> None:
    """Refuse a checkpoint of a rival before the long search for signs: arguments and errors of `check_statistics`.

    Where a rival is better than the known patterns, a short search has to find a better one.
    """
    for rival, weights in rivals.items():
        other = best_fit(_build(rival, weights), images)
        for descend in (False, True):
            fit = best_fit(_build(name, state_dict), images, descend)
            if not _leads(other, fit):
                break
        else:
            raise ValueError(_wrong_model(name, fit, rival, other, len(images)))


def check_statistics(
    name: str,
    state_dict: dict[str, torch.Tensor],
    rivals: dict[str, dict[str, torch.Tensor]],
    images: torch.Tensor,
    decided: bool = False,
) -> Statistics:
    """Compare the running statistics of a network with those on photographs, and with those of its rivals.

    Args:
        name: the model.
        state_dict: its weights; a D_4 or D_8 network's signs are settled.
        rivals: the other models that the checkpoint fits, and its weights for them; where they have signs, the best
            ones that a short search finds are taken.
        images: normalised crops of photographs [N, 3, n, n], n = 1 mod 32.
        decided: the user vouches for the model: only a rival that is clearly better is a reason to refuse.

    Raises:
        ValueError: a rival fits the statistics better, or as well; or no statistics come out.
    """
    fit = fit_as_it_stands(_build(name, state_dict), images)
    if not _is_finite(fit):
        raise ValueError(f"the activations of this {name} checkpoint are not finite on photographs: it is damaged")
    leads = {}
    for rival, weights in rivals.items():
        other = best_fit(_build(rival, weights), images)
        if _leads(other, fit):
            raise ValueError(_wrong_model(name, fit, rival, other, len(images)))
        leads[rival] = fit.lead(other) if _is_finite(other) else float("inf")
        if not _leads(fit, other) and not decided:
            raise ValueError(
                f"{name} and {rival} have the same names and shapes, and the batch-norm statistics of this checkpoint "
                f"do not tell which ({leads[rival]:.1f} standard errors on {len(images)} crops, {Z_LIMIT:.0f} are "
                f"needed; log variances off by {_rms(fit):.2g} and {_rms(other):.2g}, at most {CLEARLY} of the other's "
                "are needed): give photographs like those of its training (--images DIR), or a checkpoint with its "
                "basis"
            )
    return Statistics(_rms(fit), len(images), leads)


def _leads(fit: Fit, other: Fit) -> bool:
    if not _is_finite(fit) or not _is_finite(other):
        return _is_finite(fit)
    return fit.lead(other) >= Z_LIMIT and _rms(fit) <= CLEARLY * _rms(other)


def _wrong_model(name: str, fit: Fit, rival: str, other: Fit, crops: int) -> str:
    return (
        f"this is no checkpoint of {name}: its batch-norm statistics fit {rival}, which has the same names and shapes "
        f"(log variances off by {_rms(other):.2g} for {rival}, {_rms(fit):.2g} for {name}, {other.lead(fit):.0f} "
        f"standard errors apart, on {crops} crops): convert it as {rival}"
    )


def _build(name: str, state_dict: dict[str, torch.Tensor]) -> EquivariantResNet:
    model = create(name, EquivariantResNet)
    model.load_state_dict(state_dict)
    return model


def _is_finite(fit: Fit) -> bool:
    return all(r.isfinite().all() for r in fit.residuals)


def _rms(fit: Fit) -> float:
    return (fit.misfit / max(1, sum(len(r) for r in fit.residuals))) ** 0.5
