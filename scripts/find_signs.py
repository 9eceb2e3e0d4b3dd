"""Search all sign patterns of a D4 or D8 checkpoint of equivision that holds neither its bases nor its filters.

The converter compares the few patterns of known machines. If none is clear, this script searches all 2^24 (D4) or 2^32
(D8) by the same statistics (`equivision_timm/weights/statistics.py`). It is run once for each released file; the
pattern is recorded as `signs` in `equivision_timm/weights/released.json`.

Starting from the best known pattern and from random ones, single groups, irreps and pairs of the weakest groups are
changed as long as the fit of the first stage improves. Then the winner is compared with its neighbours, the known
patterns and the other optima on all stages, with more crops until the result is clear.

    python scripts/find_signs.py d4resnet18.ckpt --model d4resnet18 --images photographs/
"""

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from equivision_timm.data import draw_crops, load_photographs
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.variants import create
from equivision_timm.weights.checkpoint import read_checkpoint
from equivision_timm.weights.equivision import convert_original
from equivision_timm.weights.signs import combine, known_patterns, neighbours, sign_groups
from equivision_timm.weights.statistics import Z_LIMIT, AmbiguousSigns, PatternFits

MOST_BATCHES = 32
SAME_LOGITS = 1e-3  # logits that differ by less, in their standard deviations, are those of the same network


@dataclass(frozen=True)
class SignSearch:
    """The pattern found."""

    signs: str
    name: str | None  # among the known patterns
    runner_up: str  # the closest pattern with other logits
    separation: float  # Vuong's z between the two
    misfits: tuple[float, float]  # D = sum r_f^2 of both
    logits_differ: float  # largest difference of their logits, in standard deviations
    crops: int  # number of images


class Progress(PatternFits):
    """Pattern fits with a progress bar."""

    def __init__(self, model: EquivariantResNet, *batches: torch.Tensor) -> None:
        super().__init__(model, *batches)
        self.bar = tqdm(desc="fits of sign patterns", unit="")

    def fit(self, pattern: str, stages: int = 4):
        self.bar.update()
        return super().fit(pattern, stages)

    @torch.no_grad()
    def logits(self, pattern: str) -> torch.Tensor:
        """Logits of two of the images under a pattern."""
        return self.with_signs(pattern).eval()(self.batches[0][:2])


def find_signs(model: EquivariantResNet, batches: Iterable[torch.Tensor], restarts: int = 2) -> SignSearch:
    """The sign pattern of the basis of the coefficients of a D_4 or D_8 model.

    Args:
        model: with running statistics, the coefficients as in the checkpoint.
        batches: normalised images [N, 3, n, n], n = 1 mod 32; as many as needed are used, at most `MOST_BATCHES`.
        restarts: number of random starts.

    Raises:
        AmbiguousSigns: two patterns with different logits fit equally well.
    """
    if not sign_groups(model.group):
        raise ValueError(f"the basis of {model.group} is the same on every machine: only D4 and D8 have signs to find")
    batches = iter(itertools.islice(batches, MOST_BATCHES))
    fits, generator = Progress(model, next(batches)), torch.Generator().manual_seed(0)
    known = {fits.canonical(pattern): name for name, pattern in known_patterns(model.group).items()}
    starts = [max(known, key=lambda pattern: fits.fit(pattern).log_likelihood)]
    for _ in range(restarts):
        bits = torch.randint(2, (len(starts[0]),), generator=generator).tolist()
        starts.append(fits.canonical("".join("-" if bit else "+" for bit in bits)))
    optima = {climb_with_pairs(fits, start) for start in starts} | set(known)
    best = max(optima, key=lambda pattern: fits.fit(pattern, 1).log_likelihood)
    while True:
        best, leads = challenge(fits, best, optima)
        own, logits = fits.fit(best), fits.logits(best)
        for rival in sorted(leads, key=leads.__getitem__):
            difference = ((fits.logits(rival) - logits).abs().max() / logits.std()).item()
            if difference > SAME_LOGITS:
                break
        misfits = own.misfit, fits.fit(rival).misfit
        crops = sum(map(len, fits.batches))
        if leads[rival] >= Z_LIMIT and misfits[0] < misfits[1]:
            return SignSearch(best, known.get(best), rival, leads[rival], misfits, difference, crops)
        images = next(batches, None)
        if images is None:
            raise AmbiguousSigns(
                f"{best} and {rival} are {leads[rival]:.1f} standard errors apart on {crops} crops ({Z_LIMIT:.0f} are "
                f"needed), and their logits differ by {difference:.2g} standard deviations: give more varied "
                "photographs (--images DIR)"
            )
        fits.batches.append(images)
        optima |= {best, *leads}


def climb_with_pairs(fits: PatternFits, pattern: str) -> str:
    """A pattern that neither a neighbour nor a pair of its weakest sign groups improves on the first stage."""

    def score(candidate: str) -> float:
        return fits.fit(candidate, 1).log_likelihood

    moves = neighbours(fits.model.group)
    singles = moves[: len(pattern)]
    while True:
        start = pattern
        for move in moves:
            pattern = max(pattern, fits.canonical(combine(pattern, move)), key=score)
        if pattern == start:
            weakest = sorted(singles, key=lambda move: -score(combine(pattern, move)))[:4]
            for a, b in itertools.combinations(weakest, 2):
                pattern = max(pattern, fits.canonical(combine(pattern, combine(a, b))), key=score)
            if pattern == start:
                return pattern


def challenge(fits: PatternFits, best: str, others: set[str]) -> tuple[str, dict[str, float]]:
    """The winner over its neighbours and `others`, and its lead over those that are close."""
    seen = set()
    while True:
        seen.add(best)
        rivals = {fits.canonical(combine(best, move)) for move in neighbours(fits.model.group)} | others
        leads = fits.leads(best, rivals - {best})
        better = {
            rival for rival in set(leads) - seen if fits.fit(rival).log_likelihood > fits.fit(best).log_likelihood
        }
        if not better:
            return best, leads
        best = max(better, key=lambda rival: fits.fit(rival).log_likelihood)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="file of equivision")
    parser.add_argument("--model", required=True, help="e.g. d4resnet18")
    parser.add_argument("--images", type=Path, help="folder of photographs (default: those of scikit-image)")
    parser.add_argument("--restarts", type=int, default=2, help="random starts of the search")
    args = parser.parse_args()
    model = create(args.model, EquivariantResNet)
    model.load_state_dict(convert_original(read_checkpoint(args.checkpoint), args.model))
    photographs = load_photographs(args.images)
    found = find_signs(model, (draw_crops(photographs, seed=seed) for seed in range(MOST_BATCHES)), args.restarts)
    for name, value in vars(found).items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
