"""ELPV, 2,624 electroluminescence images of solar cells from 44 modules, and ways to split it.

Each cell has the probability of a defect that experts gave it, 0, 1/3, 2/3 or 1, and its kind of wafer. From the PyPI
package `elpv-dataset` (CC-BY-NC-SA). The files lie in the order of the modules, so that a random split has cells of a
module on both sides.
"""

from dataclasses import dataclass

import torch

from equivision_timm.layers.views import shrink

MODULE = 72  # cells of a module at most


@dataclass(frozen=True)
class Data:
    """Images uint8 [N, 1, H, W], the probability of a defect [N], and the stratum of each: probability and wafer."""

    images: torch.Tensor
    targets: torch.Tensor
    strata: torch.Tensor


def elpv() -> Data:
    """The 2,624 cells in the order of the files; strata 0 to 3 are monocrystalline, 4 to 7 polycrystalline."""
    from elpv_dataset.utils import load_dataset

    images, probability, wafer = load_dataset()
    targets = torch.tensor(probability.tolist())
    strata = (3 * targets).round().long() + 4 * torch.from_numpy(wafer == "poly")
    return Data(torch.from_numpy(images)[:, None], targets, strata)


def random_split(strata: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of training and test images: a quarter of each stratum is for the test."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(strata), dtype=torch.bool)
    for stratum in strata.unique():
        members = (strata == stratum).nonzero()[:, 0]
        test[members[torch.randperm(len(members), generator=generator)[: round(len(members) / 4)]]] = True
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


def block_split(strata: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices: a quarter of each wafer's images in one block for the test; those of modules that it may cut in none."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for wafer in (strata // 4).unique():
        members = (strata // 4 == wafer).nonzero()[:, 0]
        size = round(len(members) / 4)
        first = int(torch.randint(len(members) - size, (), generator=generator))
        test.append(members[first : first + size])
        train += [members[: max(0, first - MODULE)], members[first + size + MODULE :]]
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, 1, H, W] -> [N, 1, size, size] in -1 ... 1."""
    return torch.cat([shrink(batch.float(), size) / 127.5 - 1 for batch in images.split(64)])


SPLITS = {"random": random_split, "blocks": block_split}
SPLIT_TITLES = {
    "random": "Random split, as Deitsch et al.: cells of a module on both sides",
    "blocks": "Split by blocks: modules on one side",
}
