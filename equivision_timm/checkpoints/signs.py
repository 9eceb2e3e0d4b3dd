"""Find the signs of the basis in which a D_4 or D_8 checkpoint was trained, from its own batch-norm statistics.

A checkpoint without its basis leaves one sign open for each sign group (`sign_groups.py`): 2^24 networks in D_4, 2^32
in D_8. One of them was trained, and its running statistics are those of its own activations: the network with the right
signs reproduces them on photographs, others do not.

**What is ambiguous.** Let e(rho) = +1 or -1 for each irrep rho, and negate the coefficients of a group when
e(input irrep) e(output irrep) = -1. That multiplies the part of type rho of every feature map by e(rho) and leaves
every convolution as it was; only the ReLU, which acts on group elements and not on irreps, can tell. It cannot where e
is -1 exactly on the irreps that the half turn (the centre of D_N) negates: among the channels of a field this is the
permutation by the half turn, which commutes with ReLU, batch norm and group pooling. The groups concerned are those of
odd harmonic: their kernels turn by 180 degrees, and logits and statistics stay. So patterns count up to this half turn.
For other irreps (`irrep_flips`) the networks differ, but little: these are the deep local optima, and the search tries
to jump between them.

**What separates.** With r_f = log(batch variance) - log(running variance) of field f, minus the median over its layer
(other photographs than those of the training change the overall contrast), the right signs give the smallest

    D = sum_layers sum_fields r_f^2.

D adds up layers of different noise: the late ones hide the differences that the early ones show clearly. Taking the r_f
of a layer as normal with an unknown variance of its own gives the log-likelihood, which weighs them right,

    L = -1/2 sum_layers n log(mean_fields r_f^2)            n: fields of the layer.

The search maximises L; both are reported and must agree. Means of the activations are not used: they prefer wrong
patterns. Whether two patterns score alike is Vuong's test (Econometrica 57, 1989): with m_f the difference of the two
log-likelihoods at field f, z = sum m_f / (sqrt(N) std m_f). Below `Z_LIMIT` no pattern is chosen.

**How.** Signs act on all layers, but the first ones tell most and cost least. So: known patterns first; from the best
of them and from random starts, change single groups, irreps, and pairs of the weakest groups while L of the stem and
the first stage improves; then the neighbours of the winner, the known patterns and the other optima challenge it, on
more and more stages, each as long as it is not far behind; last on the whole network.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from equivision_timm.checkpoints.sign_groups import element_signs, half_turn, irrep_flips, known_patterns, sign_groups
from equivision_timm.layers import ConvNorm
from equivision_timm.models import EquivariantResNet

__all__ = ["Z_LIMIT", "AmbiguousSigns", "SignSearch", "find_signs", "statistics_misfit"]

Z_LIMIT = 3.0  # standard errors by which the chosen pattern must lead
_DEPTHS = (1, 2, 4)  # stages on which patterns are compared, one after the other
_SAME_LOGITS = 1e-3  # logits that differ by less, in their standard deviations, are the same network


class AmbiguousSigns(ValueError):
    """No pattern is clearly the best; the message names the candidates."""


@dataclass(frozen=True)
class SignSearch:
    """The pattern found, and how sure that is.

    Attributes:
        signs: the pattern, '+' and '-' by sign group.
        name: what it is called among the known patterns, None if it is none of them.
        misfit: D of the whole network.
        runner_up: the closest pattern whose logits differ.
        runner_up_misfit: its D.
        separation: Vuong's z between the two.
        logits_differ: by how much their logits differ at most, in standard deviations of the logits.
        known: D of the known patterns, by name.
    """

    signs: str
    name: str | None
    misfit: float
    runner_up: str
    runner_up_misfit: float
    separation: float
    logits_differ: float
    known: dict[str, float]


def find_signs(model: EquivariantResNet, images: torch.Tensor, restarts: int = 2) -> SignSearch:
    """The sign pattern of the basis that the coefficients of `model` are given in.

    Args:
        model: a D_4 or D_8 network with its running statistics; its coefficients are taken as they stand in the
            checkpoint. It is not changed.
        images: normalised crops of photographs [N, 3, n, n], n = 1 mod 32; the more and the more varied, the better.
        restarts: random starts of the search, besides the best known pattern.

    Raises:
        AmbiguousSigns: two patterns with different logits score alike.
        ValueError: the group has no signs to find.
    """
    if not sign_groups(model.group):
        raise ValueError(f"the basis of {model.group} is the same on every machine: there are no signs to find")
    scorer = _Scorer(model, images)
    known = {name: scorer.canonical(pattern) for name, pattern in known_patterns(model.group).items()}
    generator = torch.Generator().manual_seed(0)
    with scorer.progress:
        best_known = max(known.values(), key=lambda pattern: scorer.fit(pattern, _DEPTHS[-1]).log_likelihood)
        starts = [best_known] + [_random(len(best_known), generator) for _ in range(restarts)]
        optima = [_descend(scorer, scorer.canonical(start)) for start in starts]
        best = max([*optima, best_known], key=lambda pattern: scorer.fit(pattern, _DEPTHS[0]).log_likelihood)
        best, closest = _challenge(scorer, best, {*optima, *known.values()})
    return _conclude(scorer, model, images, best, closest, known)


def statistics_misfit(model: EquivariantResNet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """r [fields] of every layer for `model` as it is: how its running variances differ from those on `images`."""
    return _residuals(copy.deepcopy(model), images, _DEPTHS[-1])


@dataclass(frozen=True)
class _Fit:
    """r [fields] for each layer, how they add up, and how two of them compare."""

    residuals: tuple[torch.Tensor, ...]

    @property
    def misfit(self) -> float:
        return sum((r**2).sum().item() for r in self.residuals)  # D

    @property
    def log_likelihood(self) -> float:
        return -0.5 * sum(len(r) * _variance(r).log().item() for r in self.residuals)  # L

    def lead(self, other: "_Fit") -> float:
        """Vuong's z: by how many standard errors this fit is better than the other."""
        terms = [_log_density(a) - _log_density(b) for a, b in zip(self.residuals, other.residuals, strict=True)]
        m = torch.cat(terms)
        spread = m.std().item()
        return m.sum().item() / (len(m) ** 0.5 * spread) if spread > 0 else 0.0


def _variance(r: torch.Tensor) -> torch.Tensor:
    return (r**2).mean().clamp_min(1e-12)


def _log_density(r: torch.Tensor) -> torch.Tensor:
    """Log density of each r under the normal distribution of its layer, up to a constant."""
    return -0.5 * (_variance(r).log() + r**2 / _variance(r))


class _Scorer:
    """Fits of sign patterns, each computed once."""

    def __init__(self, model: EquivariantResNet, images: torch.Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.images = images
        self.half_turn = half_turn(model.group)
        self.coefficients = {name: module.conv.weight.detach().clone() for name, module in _conv_norms(model)}
        self.statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
        self.fits: dict[tuple[str, int], _Fit] = {}
        self.progress = tqdm(desc="sign patterns tried", unit="")

    def canonical(self, pattern: str) -> str:
        """Of a pattern and its half turn, the one that does not negate the first odd harmonic."""
        first = self.half_turn.index("-")
        return pattern if pattern[first] == "+" else combine(pattern, self.half_turn)

    def fit(self, pattern: str, stages: int) -> _Fit:
        """The fit of a pattern on the stem and the first `stages` stages."""
        pattern = self.canonical(pattern)
        if (pattern, stages) not in self.fits:
            self.progress.update()
            apply_signs(self.model, self.coefficients, pattern)
            self.model.load_state_dict(self.statistics, strict=False)
            self.fits[pattern, stages] = _Fit(tuple(_residuals(self.model, self.images, stages).values()))
        return self.fits[pattern, stages]


def _conv_norms(model: nn.Module) -> list[tuple[str, ConvNorm]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ConvNorm)]


def combine(a: str, b: str) -> str:
    """The product of two patterns."""
    return "".join("+" if x == y else "-" for x, y in zip(a, b, strict=True))


@torch.no_grad()
def apply_signs(model: EquivariantResNet, coefficients: dict[str, torch.Tensor], pattern: str) -> None:
    """Set every weight of `model` to `coefficients`, turned from the basis with signs `pattern` into ours."""
    elements = element_signs(model.group, pattern)
    for name, module in _conv_norms(model):
        conv = module.conv
        signs = elements[f"{conv.group}/{conv.kernel_size}x{conv.kernel_size}/{conv.input_type}"].to(conv.weight)
        conv.weight.copy_(coefficients[name] * signs[:, None])


@torch.no_grad()
def _residuals(model: EquivariantResNet, images: torch.Tensor, stages: int) -> dict[str, torch.Tensor]:
    """r [fields alive] of the layers up to stage `stages`, by name; overwrites the running statistics of `model`."""
    layers = [model.layer1, model.layer2, model.layer3, model.layer4][:stages]
    trunk = nn.Sequential(model.conv1, model.act1, model.maxpool, *layers).train()
    norms = {name: module.norm.per_field for name, module in _conv_norms(model)}
    norms = {name: norm for name, norm in norms.items() if any(norm is module for module in trunk.modules())}
    before = {name: norm.running_var.clone() for name, norm in norms.items()}
    for norm in norms.values():
        norm.momentum = 1.0  # the running statistics become those of this batch
    trunk(images)
    ratios = {}
    for name, norm in norms.items():
        alive = before[name] > 0  # a field whose coefficients are all zero tells nothing
        if alive.any():
            ratios[name] = (norm.running_var[alive] / before[name][alive]).clamp_min(1e-30).log()
    return {name: ratio - ratio.median() for name, ratio in ratios.items()}


def _random(length: int, generator: torch.Generator) -> str:
    return "".join("-" if bit else "+" for bit in torch.randint(2, (length,), generator=generator).tolist())


def _singles(length: int) -> list[str]:
    return ["+" * i + "-" + "+" * (length - i - 1) for i in range(length)]


def _descend(scorer: _Scorer, pattern: str) -> str:
    """Change groups, irreps and pairs of the weakest groups while that improves the fit of the first stage."""

    def score(candidate: str) -> float:
        return scorer.fit(candidate, _DEPTHS[0]).log_likelihood

    singles, flips = _singles(len(pattern)), irrep_flips(scorer.model.group)
    while True:
        start = pattern
        for move in singles + flips:
            pattern = max(pattern, scorer.canonical(combine(pattern, move)), key=score)
        if pattern != start:
            continue
        weakest = sorted(singles, key=lambda move: -score(combine(pattern, move)))[:4]
        for a, b in itertools.combinations(weakest, 2):
            pattern = max(pattern, scorer.canonical(combine(pattern, combine(a, b))), key=score)
        if pattern == start:
            return pattern


def _challenge(scorer: _Scorer, best: str, others: set[str]) -> tuple[str, dict[str, float]]:
    """The winner against its neighbours and `others`; and its lead, z, over each that is not far behind.

    A challenger that leads takes the winner's place, and all begins again.
    """
    seen = set()
    while True:
        seen.add(best)
        moves = _singles(len(best)) + irrep_flips(scorer.model.group)
        rivals = {scorer.canonical(combine(best, move)) for move in moves} | others
        rivals = sorted(rivals - {best})
        for stages in _DEPTHS:
            fit = scorer.fit(best, stages)
            leads = {rival: fit.lead(scorer.fit(rival, stages)) for rival in rivals}
            rivals = sorted(rivals, key=leads.__getitem__)
            rivals = [rival for i, rival in enumerate(rivals) if i == 0 or leads[rival] < 2 * Z_LIMIT]
        better = [rival for rival in rivals if scorer.fit(rival, stages).log_likelihood > fit.log_likelihood]
        better = [rival for rival in better if rival not in seen]
        if not better:
            return best, {rival: leads[rival] for rival in rivals}
        best = max(better, key=lambda rival: scorer.fit(rival, stages).log_likelihood)


def _conclude(
    scorer: _Scorer,
    model: EquivariantResNet,
    images: torch.Tensor,
    best: str,
    closest: dict[str, float],
    known: dict[str, str],
) -> SignSearch:
    """The result, or AmbiguousSigns where the closest rival with other logits is too close."""
    depth = _DEPTHS[-1]
    misfits = {name: scorer.fit(pattern, depth).misfit for name, pattern in known.items()}
    rivals = sorted(closest, key=closest.__getitem__)
    expected = _logits(scorer, model, images, best)
    runner_up, distance = rivals[0], 0.0
    for rival in rivals:  # the closest one that is another network
        difference = ((_logits(scorer, model, images, rival) - expected).abs().max() / expected.std()).item()
        if difference > _SAME_LOGITS:
            runner_up, distance = rival, difference
            break
    names = {pattern: name for name, pattern in known.items()}
    search = SignSearch(
        signs=known_patterns(model.group)[names[best]] if best in names else best,
        name=names.get(best),
        misfit=scorer.fit(best, depth).misfit,
        runner_up=runner_up,
        runner_up_misfit=scorer.fit(runner_up, depth).misfit,
        separation=closest[runner_up],
        logits_differ=distance,
        known=misfits,
    )
    if search.logits_differ > _SAME_LOGITS and (
        search.separation < Z_LIMIT or search.misfit >= search.runner_up_misfit
    ):
        rows = [(misfits[name], name, pattern) for name, pattern in known_patterns(model.group).items()]
        rows += [(scorer.fit(p, depth).misfit, "not known", p) for p in {best, *rivals} - set(known.values())]
        table = "\n".join(f"  {misfit:10.4g}  {name:18}  {pattern}" for misfit, name, pattern in sorted(rows))
        raise AmbiguousSigns(
            f"the signs of this {model.group} checkpoint cannot be told on {len(images)} crops: the two best patterns "
            f"are {search.separation:.1f} standard errors apart ({Z_LIMIT:.0f} are needed) and their logits differ by "
            f"{search.logits_differ:.2g} standard deviations. Misfit to the batch-norm statistics:\n{table}\n"
            "Give more and more varied photographs (--images DIR, best some of ImageNet's), or decide: --signs PATTERN"
        )
    return search


@torch.no_grad()
def _logits(scorer: _Scorer, model: EquivariantResNet, images: torch.Tensor, pattern: str) -> torch.Tensor:
    """What `model` says under a pattern, with the statistics of the checkpoint, on two of the images."""
    network = copy.deepcopy(model).eval()
    apply_signs(network, scorer.coefficients, pattern)
    return network(images[:2])
