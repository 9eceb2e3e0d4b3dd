"""Batch-norm statistics as evidence: does a network reproduce its running variances on photographs?

A D_4 or D_8 checkpoint without its basis leaves the signs of `signs.py` open, and D_4 and C_8 networks have the same
names and shapes. The network that was trained reproduces its own running variances, others do not. Of field f let

    r_f = log(batch variance) - log(running variance) - median of this over the layer,

the median since other photographs than those of the training change the overall contrast. With r_f normal and a
variance for each layer, the log-likelihood up to a constant is

    L = -1/2 sum_layers n log(mean_fields r_f^2)            n: fields of the layer.

Two networks are compared by Vuong's test (Econometrica 57, 1989): with m_f the difference of their log-likelihoods at
field f, z = sum m_f / (sqrt(N) std m_f). A decision needs `Z_LIMIT` standard errors, and D = sum r_f^2 must agree.
Means of the activations are not used: they prefer wrong patterns.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.optim.swa_utils import update_bn

from equivision_timm.layers import SteerableConv2d
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.weights.signs import combine, element_signs, half_turn, known_patterns, neighbours

__all__ = ["Z_LIMIT", "AmbiguousSigns", "Fit", "PatternFits", "apply_signs", "best_fit", "choose_signs", "fit"]

Z_LIMIT = 3.0  # standard errors


class AmbiguousSigns(WeightsError):
    """No known sign pattern is clearly the best."""


class Fit(NamedTuple):
    """r [fields] of each layer."""

    residuals: list[torch.Tensor]

    @property
    def misfit(self) -> float:
        """D = sum_layers sum_fields r_f^2."""
        return torch.cat(self.residuals).square().sum().item()

    @property
    def rms(self) -> float:
        """sqrt(D / number of fields)."""
        return torch.cat(self.residuals).square().mean().sqrt().item()

    @property
    def log_densities(self) -> torch.Tensor:
        """-1/2 (log v + r_f^2 / v), v = mean_fields r_f^2 of the layer: [fields of all layers]."""
        variances = [r.square().mean().clamp_min(1e-12) for r in self.residuals]
        return torch.cat([-0.5 * (v.log() + r.square() / v) for r, v in zip(self.residuals, variances, strict=True)])

    @property
    def log_likelihood(self) -> float:
        """L, up to a constant."""
        return self.log_densities.sum().item()

    def lead(self, other: "Fit") -> float:
        """Vuong's z: standard errors by which this fit is better."""
        m = self.log_densities - other.log_densities
        spread = m.std().item()
        return m.sum().item() / (len(m) ** 0.5 * spread) if spread > 0 else 0.0


def fit(model: EquivariantResNet, images: torch.Tensor) -> Fit:
    """How well a model reproduces its running variances on normalised images [N, 3, n, n], n = 1 mod 32."""
    return _fit([_ratios(copy.deepcopy(model), images, stages=4)])


def best_fit(model: EquivariantResNet, images: torch.Tensor) -> Fit:
    """`fit` under the best of the known sign patterns, if the group has signs."""
    known = known_patterns(model.group).values()
    if not known:
        return fit(model, images)
    fits = PatternFits(model, images)
    return max(map(fits.fit, known), key=lambda found: found.log_likelihood)


def choose_signs(model: EquivariantResNet, batches: Iterable[torch.Tensor]) -> dict[str, str]:
    """The known sign pattern in whose basis the coefficients of a D_4 or D_8 model are given.

    It must lead the other known patterns and its own neighbours, which are unknown ones.

    Args:
        model: with running statistics, the coefficients as in the checkpoint.
        batches: normalised images [N, 3, n, n], n = 1 mod 32; as many are used as it takes.

    Returns:
        Notes for the provenance: the pattern as `signs`, its name, the closest other pattern, Vuong's z between the
        two, and D of each known pattern.

    Raises:
        AmbiguousSigns: no known pattern is clearly the best.
    """
    known, fits = known_patterns(model.group), PatternFits(model)
    crops, reason, misfits, best, rivals = 0, "there are no images", "", "", set()
    for images in batches:
        crops += len(images)
        fits.batches.append(images)
        found = {name: fits.fit(pattern) for name, pattern in known.items()}
        misfits = ", ".join(f"{name} {one.misfit:.4g}" for name, one in found.items())
        previous, best = best, max(found, key=lambda name: found[name].log_likelihood)
        if best != previous:
            rivals = {combine(known[best], move) for move in neighbours(model.group)} | set(known.values())
            rivals = {fits.canonical(rival) for rival in rivals} - {fits.canonical(known[best])}
        leads = fits.leads(known[best], rivals)
        rivals = set(leads)
        runner_up = min(leads, key=leads.__getitem__)
        lead = leads[runner_up]
        if lead >= Z_LIMIT and all(found[best].misfit < fits.fit(rival).misfit for rival in leads):
            return {
                "signs": known[best],
                "signs_known_as": best,
                "runner_up": runner_up,
                "separation": f"{lead:.1f} standard errors on {crops} crops",
                "known_misfits": misfits,
            }
        reason = f"{best} leads {runner_up} by {lead:.1f} standard errors, {Z_LIMIT:.0f} are needed"
        if lead <= -Z_LIMIT:  # an unknown pattern is better
            break
    raise AmbiguousSigns(
        f"the signs of this {model.group} checkpoint are not clear on {crops} crops: {reason} (misfits: {misfits}). "
        "Give more varied photographs (--images DIR), search all patterns with scripts/find_signs.py, or give --signs"
    )


class PatternFits:
    """Fits of a model under sign patterns, each computed once for each batch of images."""

    def __init__(self, model: EquivariantResNet, *batches: torch.Tensor) -> None:
        self.model: EquivariantResNet = copy.deepcopy(model)
        self.batches: list[torch.Tensor] = list(batches)
        self._state = {name: value.clone() for name, value in model.state_dict().items()}
        self._found: dict[tuple[str, int], list[list[torch.Tensor]]] = {}

    def canonical(self, pattern: str) -> str:
        """A pattern, or its product with the half turn: the one that does not negate the first odd harmonic."""
        half = half_turn(self.model.group)
        return pattern if pattern[half.index("-")] == "+" else combine(pattern, half)

    def fit(self, pattern: str, stages: int = 4) -> Fit:
        """Fit of the stem and the first `stages` stages under a pattern."""
        pattern = self.canonical(pattern)
        found = self._found.setdefault((pattern, stages), [])
        for images in self.batches[len(found) :]:
            found.append(_ratios(self.with_signs(pattern), images, stages))
        return _fit(found)

    def leads(self, pattern: str, rivals: Iterable[str]) -> dict[str, float]:
        """Vuong's z of a pattern over its close rivals: those that are not clearly worse on the first stages."""
        leads = dict.fromkeys(rivals, 0.0)
        for stages in (1, 2, 4):
            own = self.fit(pattern, stages)
            leads = {rival: own.lead(self.fit(rival, stages)) for rival in leads}
            closest = min(leads.values())
            leads = {rival: lead for rival, lead in leads.items() if lead < 2 * Z_LIMIT or lead == closest}
        return leads

    def with_signs(self, pattern: str) -> EquivariantResNet:
        """The model under a pattern, until the next call."""
        self.model.load_state_dict(self._state)
        apply_signs(self.model, pattern)
        return self.model


@torch.no_grad()
def apply_signs(model: EquivariantResNet, pattern: str) -> None:
    """Multiply every weight of `model` by the signs of its basis elements."""
    for module in model.modules():
        if isinstance(module, SteerableConv2d):
            weight = module.weight  # [out_fields, in_fields, n_basis, 1]
            weight.mul_(element_signs(module.kernel, pattern).to(weight))


def _fit(ratios: list[list[torch.Tensor]]) -> Fit:
    """The fit to ratios, averaged over batches."""
    logs = [torch.stack(batches).mean(0).clamp_min(1e-30).log() for batches in zip(*ratios, strict=True)]
    return Fit([r - r.median() for r in logs])


@torch.no_grad()
def _ratios(model: EquivariantResNet, images: torch.Tensor, stages: int) -> list[torch.Tensor]:
    """Batch variance / running variance [fields] of each layer up to stage `stages`. Changes the running statistics."""
    layers = [model.layer1, model.layer2, model.layer3, model.layer4][:stages]
    trunk = nn.Sequential(model.conv1, model.maxpool, *layers)
    before = {name: value.clone() for name, value in trunk.named_buffers() if name.endswith("running_var")}
    update_bn([images], trunk)  # the running statistics become those of these images
    alive = {name: variance > 0 for name, variance in before.items()}  # zero if all coefficients of a field are
    return [trunk.get_buffer(name)[alive[name]] / before[name][alive[name]] for name in before if alive[name].any()]
