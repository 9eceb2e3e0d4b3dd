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

How far apart two patterns are depends on the noise of the batch variances: with 40 crops a neighbour of the truth may
lie 1.6 standard errors off, with 384 it lies 6.5 off. So the few finalists are compared on more and more crops, up to
`MOST_BATCHES` times as many, until the answer is clear. Variances are averaged over batches, as in training.

**How.** Signs act on all layers, but the first ones tell most and cost least. So: known patterns first; from the best
of them and from random starts, change single groups, irreps, and pairs of the weakest groups while L of the stem and
the first stage improves; then the neighbours of the winner, the known patterns and the other optima challenge it, on
more and more stages, each as long as it is not far behind; last on the whole network, with as many crops as it takes.
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from equivision_timm.kernel_basis import table_key
from equivision_timm.layers import ConvNormAct
from equivision_timm.models import EquivariantResNet
from equivision_timm.weights.equivision.sign_groups import (
    element_signs,
    half_turn,
    irrep_flips,
    known_patterns,
    sign_groups,
)

__all__ = [
    "MOST_BATCHES",
    "Z_LIMIT",
    "AmbiguousSigns",
    "Fit",
    "SignSearch",
    "best_fit",
    "find_signs",
    "fit_as_it_stands",
    "statistics_misfit",
]

Z_LIMIT = 3.0  # standard errors by which the chosen pattern must lead
MOST_BATCHES = 32  # of crops, on which the finalists are compared
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
        crops: on how many crops the finalists were compared.
        logits_differ: by how much their logits differ at most, in standard deviations of the logits.
        known: D of the known patterns, by name.
    """

    signs: str
    name: str | None
    misfit: float
    runner_up: str
    runner_up_misfit: float
    separation: float
    crops: int
    logits_differ: float
    known: dict[str, float]


def find_signs(
    model: EquivariantResNet, images: torch.Tensor, restarts: int = 2, more: Iterable[torch.Tensor] = ()
) -> SignSearch:
    """The sign pattern of the basis that the coefficients of `model` are given in.

    Args:
        model: a D_4 or D_8 network with its running statistics; its coefficients are taken as they stand in the
            checkpoint. It is not changed.
        images: normalised crops of photographs [N, 3, n, n], n = 1 mod 32; the more and the more varied, the better.
        restarts: random starts of the search, besides the best known pattern.
        more: further crops, [N, 3, n, n] each, for the finalists; at most `MOST_BATCHES` - 1 are taken, and no more
            than needed.

    Raises:
        AmbiguousSigns: two patterns with different logits score alike, on all the crops.
        ValueError: the group has no signs to find.
    """
    if not sign_groups(model.group):
        raise ValueError(f"the basis of {model.group} is the same on every machine: there are no signs to find")
    scorer = _Scorer(model, images)
    known = {name: scorer.canonical(pattern) for name, pattern in known_patterns(model.group).items()}
    generator = torch.Generator().manual_seed(0)
    with scorer.progress:
        best_known = _best_known(scorer)
        starts = [best_known] + [_random(len(best_known), generator) for _ in range(restarts)]
        optima = [_descend(scorer, scorer.canonical(start)) for start in starts]
        best = max([*optima, best_known], key=lambda pattern: scorer.fit(pattern, _DEPTHS[0]).log_likelihood)
        best, leads = _challenge(scorer, best, {*optima, *known.values()})
        best, leads = _decide(scorer, best, leads, itertools.islice(more, MOST_BATCHES - 1))
        return _conclude(scorer, best, leads, known)


def fit_as_it_stands(model: EquivariantResNet, images: torch.Tensor) -> "Fit":
    """How well `model`, of any group and unchanged, reproduces its running statistics on images as in `find_signs`."""
    return _Scorer(model, images).fit("", _DEPTHS[-1])


def best_fit(model: EquivariantResNet, images: torch.Tensor, descend: bool = True) -> "Fit":
    """The same under the best known sign pattern, or the one that a descent from there finds; any group."""
    if not sign_groups(model.group):
        return fit_as_it_stands(model, images)
    scorer = _Scorer(model, images)
    with scorer.progress:
        start = _best_known(scorer)
        ends = (start, _descend(scorer, start)) if descend else (start,)
        return max((scorer.fit(pattern, _DEPTHS[-1]) for pattern in ends), key=lambda fit: fit.log_likelihood)


def statistics_misfit(model: EquivariantResNet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """r [fields] of every layer for `model` as it stands: how its running variances differ from those on `images`."""
    ratios = _ratios(copy.deepcopy(model), images, _DEPTHS[-1])
    return {name: _residual(ratio) for name, ratio in ratios.items()}


@dataclass(frozen=True)
class Fit:
    """r [fields] for each layer, how they add up, and how two of them compare."""

    residuals: tuple[torch.Tensor, ...]

    @property
    def misfit(self) -> float:
        """D = sum_layers sum_fields r_f^2."""
        return sum((r**2).sum().item() for r in self.residuals)

    @property
    def log_likelihood(self) -> float:
        """L = -1/2 sum_layers n log(mean_fields r_f^2)."""
        return -0.5 * sum(len(r) * _variance(r).log().item() for r in self.residuals)

    def lead(self, other: "Fit") -> float:
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
    """Fits of sign patterns on batches of crops, each computed once."""

    def __init__(self, model: EquivariantResNet, images: torch.Tensor) -> None:
        self.model = copy.deepcopy(model)
        self.batches = [images]
        self.half_turn = half_turn(model.group)
        self.coefficients = {name: module.conv.weight.detach().clone() for name, module in _conv_norms(model)}
        self.statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
        self.ratios: dict[tuple[str, int], list[tuple[torch.Tensor, ...]]] = {}  # one a batch
        self.progress = tqdm(desc="sign patterns tried", unit="", disable=not self.half_turn)

    def canonical(self, pattern: str) -> str:
        """Of a pattern and its half turn, the one that does not negate the first odd harmonic."""
        first = self.half_turn.index("-")
        return pattern if pattern[first] == "+" else combine(pattern, self.half_turn)

    def fit(self, pattern: str, stages: int) -> Fit:
        """The fit of a pattern (empty: the coefficients as they stand) on the stem and the first `stages` stages."""
        pattern = self.canonical(pattern) if pattern else pattern
        known = self.ratios.setdefault((pattern, stages), [])
        if len(known) < len(self.batches):
            self._set(pattern)
        for images in self.batches[len(known) :]:
            self.progress.update()
            self.model.load_state_dict(self.statistics, strict=False)
            known.append(tuple(_ratios(self.model, images, stages).values()))
        layers = zip(*known, strict=True)  # for each layer, its ratios in every batch
        return Fit(tuple(_residual(torch.stack(ratios).mean(0)) for ratios in layers))

    @torch.no_grad()
    def logits(self, pattern: str) -> torch.Tensor:
        """What the network says under a pattern, with the statistics of the checkpoint, on two of the images."""
        self._set(pattern)
        self.model.load_state_dict(self.statistics, strict=False)
        return self.model.eval()(self.batches[0][:2])

    def _set(self, pattern: str) -> None:
        if pattern:
            apply_signs(self.model, self.coefficients, pattern)


def _conv_norms(model: nn.Module) -> list[tuple[str, ConvNormAct]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ConvNormAct)]


def combine(a: str, b: str) -> str:
    """The product of two patterns."""
    return "".join("+" if x == y else "-" for x, y in zip(a, b, strict=True))


@torch.no_grad()
def apply_signs(model: EquivariantResNet, coefficients: dict[str, torch.Tensor], pattern: str) -> None:
    """Set every weight of `model` to `coefficients`, turned from the basis with signs `pattern` into ours."""
    elements = element_signs(model.group, pattern)
    for name, module in _conv_norms(model):
        conv = module.conv
        signs = elements[table_key(conv.kernel)].to(conv.weight)
        conv.weight.copy_(coefficients[name] * signs[:, None])


@torch.no_grad()
def _ratios(model: EquivariantResNet, images: torch.Tensor, stages: int) -> dict[str, torch.Tensor]:
    """Batch variance / running variance [fields alive] of the layers up to stage `stages`, by name.

    Overwrites the running statistics of `model`.
    """
    layers = [model.layer1, model.layer2, model.layer3, model.layer4][:stages]
    trunk = nn.Sequential(model.conv1, model.maxpool, *layers).train()
    norms = {name: module.norm.per_field for name, module in _conv_norms(model)}
    among = set(trunk.modules())
    norms = {name: norm for name, norm in norms.items() if isinstance(norm, nn.BatchNorm2d) and norm in among}
    before = {name: norm.get_buffer("running_var").clone() for name, norm in norms.items()}
    for norm in norms.values():
        norm.momentum = 1.0  # the running statistics become those of this batch
    trunk(images)
    ratios = {}
    for name, norm in norms.items():
        alive = before[name] > 0  # a field whose coefficients are all zero tells nothing
        if alive.any():
            ratios[name] = norm.get_buffer("running_var")[alive] / before[name][alive]
    return ratios


def _residual(ratio: torch.Tensor) -> torch.Tensor:
    """r of the fields of a layer: the logarithm of their ratios, less its median."""
    r = ratio.clamp_min(1e-30).log()
    return r - r.median()


def _best_known(scorer: _Scorer) -> str:
    known = [scorer.canonical(pattern) for pattern in known_patterns(scorer.model.group).values()]
    return max(known, key=lambda pattern: scorer.fit(pattern, _DEPTHS[-1]).log_likelihood)


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
        rivals, leads = sorted(rivals - {best}), {}
        for stages in _DEPTHS:
            fit = scorer.fit(best, stages)
            leads = {rival: fit.lead(scorer.fit(rival, stages)) for rival in rivals}
            rivals = sorted(rivals, key=leads.__getitem__)
            rivals = [rival for i, rival in enumerate(rivals) if i == 0 or leads[rival] < 2 * Z_LIMIT]
        stages = _DEPTHS[-1]
        least = scorer.fit(best, stages).log_likelihood
        better = [rival for rival in rivals if scorer.fit(rival, stages).log_likelihood > least]
        better = [rival for rival in better if rival not in seen]
        if not better:
            return best, {rival: leads[rival] for rival in rivals}
        best = max(better, key=lambda rival: scorer.fit(rival, stages).log_likelihood)


def _decide(
    scorer: _Scorer, best: str, leads: dict[str, float], more: Iterable[torch.Tensor]
) -> tuple[str, dict[str, float]]:
    """The winner and its lead over the finalists, on as many more crops as it takes to tell them apart."""
    depth = _DEPTHS[-1]
    for images in more:
        if _is_clear(scorer, best, leads):
            break
        scorer.batches.append(images)
        leader = max([best, *leads], key=lambda pattern: scorer.fit(pattern, depth).log_likelihood)
        if leader != best:  # its neighbours have not been looked at
            best, leads = _challenge(scorer, leader, {best, *leads})
        fit = scorer.fit(best, depth)
        leads = {rival: fit.lead(scorer.fit(rival, depth)) for rival in leads}
        rivals = sorted(leads, key=leads.__getitem__)
        leads = {rival: leads[rival] for i, rival in enumerate(rivals) if i == 0 or leads[rival] < 2 * Z_LIMIT}
    return best, leads


def _runner_up(scorer: _Scorer, best: str, leads: dict[str, float]) -> tuple[str, float]:
    """The closest rival that is another network, and by how much its logits differ; else the closest one."""
    rivals = sorted(leads, key=leads.__getitem__)
    expected = scorer.logits(best)
    for rival in rivals:
        difference = ((scorer.logits(rival) - expected).abs().max() / expected.std()).item()
        if not difference <= _SAME_LOGITS:
            return rival, difference
    return rivals[0], 0.0


def _is_clear(scorer: _Scorer, best: str, leads: dict[str, float]) -> bool:
    """Whether the winner leads every other network by enough, in the likelihood and in the misfit."""
    runner_up, distance = _runner_up(scorer, best, leads)
    misfits = [scorer.fit(pattern, _DEPTHS[-1]).misfit for pattern in (best, runner_up)]
    return not distance or (leads[runner_up] >= Z_LIMIT and misfits[0] < misfits[1])


def _conclude(scorer: _Scorer, best: str, leads: dict[str, float], known: dict[str, str]) -> SignSearch:
    """The result, or AmbiguousSigns where the closest rival with other logits is too close."""
    depth, group = _DEPTHS[-1], scorer.model.group
    clear = _is_clear(scorer, best, leads)
    crops = sum(len(images) for images in scorer.batches)
    runner_up, distance = _runner_up(scorer, best, leads)
    names = {pattern: name for name, pattern in known.items()}
    finalists = {pattern: scorer.fit(pattern, depth).misfit for pattern in (best, *leads)}
    del scorer.batches[1:]  # the known patterns are far behind: the first crops tell
    misfits = {name: finalists.get(p, scorer.fit(p, depth).misfit) for name, p in known.items()}
    if not clear:
        rows = [(misfits[name], name, pattern) for name, pattern in known_patterns(group).items()]
        rows += [(finalists[p], "not known", p) for p in set(finalists) - set(known.values())]
        table = "\n".join(f"  {misfit:10.4g}  {name:18}  {pattern}" for misfit, name, pattern in sorted(rows))
        raise AmbiguousSigns(
            f"the signs of this {group} checkpoint cannot be told on {crops} crops: the two best patterns "
            f"are {leads[runner_up]:.1f} standard errors apart ({Z_LIMIT:.0f} are needed) and their logits differ by "
            f"{distance:.2g} standard deviations. Misfit to the batch-norm statistics:\n{table}\n"
            "Give more and more varied photographs (--images DIR, best some of ImageNet's), or decide: --signs PATTERN"
        )
    return SignSearch(
        signs=known_patterns(group)[names[best]] if best in names else best,
        name=names.get(best),
        misfit=finalists[best],
        runner_up=runner_up,
        runner_up_misfit=finalists[runner_up],
        separation=leads[runner_up],
        crops=crops,
        logits_differ=distance,
        known=misfits,
    )
