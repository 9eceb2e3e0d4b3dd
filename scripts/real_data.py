"""Solar cells, defective or not, in any orientation: networks from scratch and a pretrained one, plain and equivariant.

    pip install 'equivision-timm[real]'
    python scripts/real_data.py              # one seed, networks from scratch at 97 pixels: half an hour of one core
    python scripts/real_data.py --full       # all rows, seeds and splits: hours
    python scripts/real_data.py --table      # train nothing, write the table and the picture again

Data: ELPV, 2,624 electroluminescence images of solar cells from 44 modules with the probability of a defect, from the
PyPI package `elpv-dataset` (CC-BY-NC-SA: used from there, no image of it is written). Recipe of Deitsch et al.,
Automatic Classification of Defective Photovoltaic Module Cells in Electroluminescence Images (2019): a quarter for the
test, stratified by probability and type of wafer; defective means p > 1/2. The files lie in the order of the modules,
so that a random split has cells of a module on both sides; the split by blocks has not.

Every row sees the same images in the same order for a seed. The loss is the cross-entropy to p itself. A test image is
seen in all eight orientations of the square (quarter turns and reflections), one at a time, and averaged over them.
Results are added to scripts/benchmarks/real.json after each run; the same call goes on where it was interrupted.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapted_table import lite0
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

from equivision_timm.layers.views import act, act_each, shrink
from equivision_timm.models import Symmetrized

RESULTS = Path(__file__).parent / "benchmarks" / "real.json"
VIEWS = 8  # elements of D4
BATCH_SIZE = 32
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


SPLITS = {"random": random_split, "blocks": block_split}


class Grey(nn.Module):
    """A network of colour images, given grey ones [B, 1, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def pretrained(frozen_stages: int) -> nn.Module:
    """ImageNet's lite0, symmetrized, one logit; stem and first stages stay as they are, batch norms included."""
    network = lite0()
    network.reset_classifier(1)
    for part in [network.conv_stem, network.bn1, *network.blocks[:frozen_stages]]:
        part.requires_grad_(False).eval()
        part.train = lambda mode=True: None  # eval mode for ever
    return Grey(Symmetrized(network, "d4", train_views=1)).to(memory_format=torch.channels_last)


def scratch(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, in_chans=1, num_classes=1, **arguments)


@dataclass(frozen=True)
class Row:
    """A network and its training.

    Attributes:
        create: makes the network.
        size: pixels of a side.
        moved: training images are moved by random elements of D4.
        epochs: over the training images, after `small_epochs`.
        small: pixels of a side in the first `small_epochs`.
        learning_rate: the largest, of AdamW under a cosine.
    """

    create: Callable[[], nn.Module]
    size: int = 97
    moved: bool = True
    epochs: int = 30
    small: int = 0
    small_epochs: int = 0
    learning_rate: float = 3e-3


TINY = {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)}
ROWS = {
    "plain ResNet": Row(partial(scratch, "test_c1resnet"), moved=False),
    "plain ResNet, D4 augmentation": Row(partial(scratch, "test_c1resnet")),
    "D4 ResNet": Row(partial(scratch, "test_d4resnet"), moved=False),
    "D4 alias-free ResNet": Row(partial(scratch, "test_c8resnetaf", group="d4"), moved=False),
    "D4 ConvNeXt": Row(partial(scratch, "d4convnext_atto", patch_size=2, **TINY), size=96, moved=False),
    "D4 ResNet, wide": Row(partial(scratch, "test_d4resnet", width=8), 129, False, 45),
    "lite0, fine-tuned": Row(partial(pretrained, 2), 224, True, 10, 129, 6, 1e-3),
}


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, 1, H, W] -> [N, 1, size, size] in -1 ... 1."""
    return torch.cat([shrink(batch.float(), size) / 127.5 - 1 for batch in images.split(64)])


def augmented(x: torch.Tensor, moved: bool, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 1, n, n] shifted by up to n / 24 pixels, with another brightness and contrast, and moved by D4."""
    n, reach = x.shape[-1], x.shape[-1] // 24
    x = F.pad(x, [reach] * 4, mode="reflect")
    places = torch.randint(2 * reach + 1, (len(x), 2), generator=generator).tolist()
    x = torch.stack([image[:, i : i + n, j : j + n] for image, (i, j) in zip(x, places, strict=True)])
    contrast, brightness = 0.2 * (2 * torch.rand(2, len(x), 1, 1, 1, generator=generator) - 1)
    x = (x + 1) * contrast.exp() + brightness - 1
    elements = torch.randint(VIEWS, (len(x),), generator=generator)
    return act_each(x, elements, 4, reflections=True) if moved else x


def train(row: Row, images: torch.Tensor, targets: torch.Tensor, seed: int, title: str = "") -> nn.Module:
    """The network trained on images [N, 1, n, n] with probabilities [N], in eval mode."""
    random_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = row.create().train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=row.learning_rate, weight_decay=0.05)
    epochs, steps = row.small_epochs + row.epochs, len(images) // BATCH_SIZE
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs * steps,
        warmup_epochs=epochs * steps // 10,
        warmup_lr=row.learning_rate / 20,
    )
    for epoch in tqdm(range(epochs), title, unit="epoch"):
        order = torch.randperm(len(images), generator=generator)
        for step, chosen in enumerate(order[: steps * BATCH_SIZE].split(BATCH_SIZE)):
            scheduler.step(epoch * steps + step)
            x = augmented(images[chosen], row.moved, generator)
            x = shrink(x, row.small) if epoch < row.small_epochs else x
            loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def view_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[8, N]: the logit of each image in each of the eight orientations; of a symmetrized network, its backbone's."""
    network = Grey(model.network.backbone) if isinstance(model, Grey) else model
    rows = [[network(act(x, g, 4))[:, 0] for x in images.split(32)] for g in range(VIEWS)]
    return torch.stack([torch.cat(row) for row in rows])


def scores(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Accuracy at probability 1/2 and area under the ROC curve, per cent, of logits [N]."""
    defective = targets > 0.5
    accuracy = ((logits > 0) == defective).double().mean()
    positive, negative = logits[defective][:, None], logits[~defective]
    area = (positive > negative).double().mean() + (positive == negative).double().mean() / 2
    return [round(100 * accuracy.item(), 2), round(100 * area.item(), 2)]


@torch.inference_mode()
def drift(model: nn.Module, images: torch.Tensor) -> float:
    """The largest change of a logit when an image is moved."""
    return max((model(act(images, g, 4)) - model(images)).abs().max().item() for g in range(1, VIEWS))


def run(row: Row, data: Data, split: str, seed: int, title: str = "") -> dict[str, Any]:
    """Train, test, and describe one network."""
    train_part, test_part = SPLITS[split](data.strata, seed)
    images = resized(data.images, row.size)
    start = time.process_time()
    model = train(row, images[train_part], data.targets[train_part], seed, title)
    seconds = time.process_time() - start
    logits = view_logits(model, images[test_part])
    return {
        "views": [scores(view, data.targets[test_part]) for view in logits],
        "averaged": scores(logits.mean(0), data.targets[test_part]),
        "drift": drift(model, images[test_part][:16]),
        "training seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pixels": row.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all rows, seeds and splits")
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="these rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--splits", nargs="+", default=["random"], choices=list(SPLITS))
    args = parser.parse_args()
    data = elpv()
    for split in args.splits:
        for seed in args.seeds:
            for title in args.only:
                key = f"{split} {seed}"
                found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                if key in found.get(title, {}):
                    continue
                result = run(ROWS[title], data, split, seed, f"{title}, {key}")
                found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                found.setdefault(title, {})[key] = result
                print(title, key, result, flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
