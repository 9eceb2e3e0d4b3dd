"""Accuracy against the number of labels, for textures without a preferred orientation.

    pip install '.[test]'
    python scripts/few_labels.py             # half an hour of one core; the same call continues an interrupted one
    python scripts/few_labels.py --table     # only write the table and the picture again

Seven photographs that scikit-image ships: brick, grass, gravel, a cell and a retina (CC0), galaxies (NASA, public
domain) and tissue (no known copyright restrictions). Grey pieces of 65 pixels in a disc, each with mean 0 and
deviation 1, so that brightness does not matter. Labelled pieces come from the left half of each photograph, test pieces
from the right half. The labelled ones are upright as photographed, the test pieces are rotated by any angle.

The networks have about as many parameters, the same optimiser and the same number of steps. Results are written to
scripts/benchmarks/few_labels.json, .md and .png.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from functools import cache

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from report import BENCHMARKS, markdown, read, spread, today, write
from skimage import data
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

import equivision_timm  # noqa: F401  registers the models

RESULTS = BENCHMARKS / "few_labels"
SIZE = 65  # pixels of a piece
WINDOW = 93  # holds a piece at every angle: more than sqrt(2) times as large
SIDE = 512  # of a photograph
LABELS = (2, 5, 10, 20, 50)  # of each class
TEST_PIECES = 50  # of each class
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, LEARNING_RATE = 150, 32, 5e-3


@dataclass(frozen=True)
class Network:
    """A network of the comparison, the rotations in its training, and its line in the picture."""

    model: str
    limit: float  # degrees, either way
    colour: str
    style: str = "-"


NETWORKS = {
    "plain": Network("test_c1resnet", 0, "#d55e00"),
    "plain, all rotations": Network("test_c1resnet", 180, "#009e73"),
    "C8": Network("test_c8resnet", 0, "#56b4e9"),
    "C8 alias-free": Network("test_c8resnetaf", 0, "#0072b2"),
    "C8 alias-free, up to 22.5°": Network("test_c8resnetaf", 22.5, "#0072b2", "--"),
    "C8 alias-free, all rotations": Network("test_c8resnetaf", 180, "#0072b2", ":"),
}


@cache
def photographs() -> dict[str, torch.Tensor]:
    """Grey photographs [SIDE, SIDE] by class."""
    surfaces = ("brick", "grass", "gravel", "immunohistochemistry", "cell", "hubble_deep_field", "retina")
    found = {}
    for name in surfaces:
        pixels = torch.from_numpy(getattr(data, name)().copy()).double()
        grey = pixels.mean(2) if pixels.ndim == 3 else pixels
        scale = SIDE / min(grey.shape)
        size = [max(SIDE, round(side * scale)) for side in grey.shape]
        grey = F.interpolate(grey[None, None], size, mode="bilinear", antialias=True)[0, 0]
        top, left = ((side - SIDE) // 2 for side in size)
        found[name] = grey[top : top + SIDE, left : left + SIDE].float()
    return found


def windows(part: str, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` windows of each photograph at random places of its half, 'train' or 'test': [N, 1, W, W], labels [N]."""
    first = 0 if part == "train" else SIDE // 2
    pieces, labels = [], []
    for label, photograph in enumerate(photographs().values()):
        half = photograph[:, first : first + SIDE // 2]
        for _ in range(count):
            top, left = (int(torch.randint(side - WINDOW + 1, (), generator=generator)) for side in half.shape)
            pieces.append(half[top : top + WINDOW, left : left + WINDOW])
            labels.append(label)
    return torch.stack(pieces)[:, None], torch.tensor(labels)


def images(pieces: torch.Tensor, limit: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Windows [N, 1, W, W] -> normalised discs [N, 3, SIZE, SIZE], rotated by up to `limit` degrees, either way."""
    if limit:
        angle = (2 * torch.rand(len(pieces), generator=generator) - 1) * math.radians(limit)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(pieces))
        matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # [N, 6] -> [N, 2, 3]
        grid = F.affine_grid(matrices, list(pieces.shape), align_corners=False)
        pieces = F.grid_sample(pieces, grid, mode="bicubic", align_corners=False)
    margin = (WINDOW - SIZE) // 2
    pieces = pieces[..., margin : margin + SIZE, margin : margin + SIZE]
    axis = torch.linspace(-1, 1, SIZE)
    disc = (axis[:, None] ** 2 + axis**2 <= 1).float()
    mean = (pieces * disc).sum((2, 3), keepdim=True) / disc.sum()
    centred = (pieces - mean) * disc
    deviation = (centred.square().sum((2, 3), keepdim=True) / disc.sum()).sqrt().clamp(min=1e-3)
    return (centred / deviation).expand(-1, 3, -1, -1)


def train(network: Network, labels_of_each: int, seed: int, steps: int = STEPS) -> nn.Module:
    """A network trained from scratch, in eval mode."""
    random_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pieces, labels = windows("train", labels_of_each, generator)
    model = timm.create_model(network.model, num_classes=len(photographs())).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=steps, warmup_epochs=steps // 10, warmup_lr=LEARNING_RATE / 20
    )
    for step in range(steps):
        chosen = torch.randint(len(pieces), (BATCH_SIZE,), generator=generator)
        scheduler.step(step)
        logits = model(images(pieces[chosen], network.limit, generator))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, limit: float) -> float:
    """Accuracy in per cent on the test pieces, rotated by up to `limit` degrees; the same pieces for all models."""
    generator = torch.Generator().manual_seed(2**31)
    pieces, labels = windows("test", TEST_PIECES, generator)
    inputs = images(pieces, limit, generator)
    correct = torch.cat([model(batch).argmax(1) for batch in inputs.split(100)]) == labels
    return 100 * correct.double().mean().item()


def table(results: dict[str, dict]) -> str:
    """As Markdown: mean over the seeds, and the least and the largest."""
    rows = []
    for title, by_count in results["runs"].items():
        runs = {count: by_count[str(count)].values() for count in LABELS if str(count) in by_count}
        cells = [spread([run["rotated"] for run in runs[count]]) if count in runs else "" for count in LABELS]
        upright = [run["upright"] for run in runs.get(LABELS[-1], ())]
        rows.append([title, *cells, f"{statistics.mean(upright):.1f}" if upright else ""])
    columns = ["network and training", *(f"{n} labels a class" for n in LABELS), "upright test pieces, 50"]
    return f"""# Few labels, any orientation

Written by `scripts/few_labels.py`, {results["about"]}. Which of seven surfaces a rotated piece shows, per cent of \
{7 * TEST_PIECES} test pieces; mean of the seeds (least to largest). Labelled pieces are all upright.

{markdown(columns, rows)}

![The same as curves]({RESULTS.name}.png)
"""


def picture(results: dict[str, dict]) -> Figure:
    """Accuracy against the number of labels: the mean of the seeds as a line, their range as a band."""
    figure = Figure(figsize=(7.5, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for title, by_count in results["runs"].items():
        network = NETWORKS[title]
        runs = [[run["rotated"] for run in by_seed.values()] for by_seed in by_count.values()]
        counts, mean = [int(count) for count in by_count], [statistics.mean(values) for values in runs]
        axes.plot(counts, mean, "o", ls=network.style, color=network.colour, label=title, linewidth=2)
        low, high = [min(values) for values in runs], [max(values) for values in runs]
        axes.fill_between(counts, low, high, color=network.colour, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(LABELS, [str(count) for count in LABELS])
    axes.minorticks_off()
    axes.set(xlabel="labelled pieces of each surface", ylabel="accuracy on rotated test pieces, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing, write table and picture")
    args = parser.parse_args()
    results = read(RESULTS) or {"runs": {}}
    plan = [(seed, count, title) for seed in SEEDS for count in LABELS for title in NETWORKS]
    for seed, count, title in tqdm([] if args.table else plan, unit="run"):
        done = results["runs"].setdefault(title, {}).setdefault(str(count), {})
        if str(seed) not in done:
            model = train(NETWORKS[title], count, seed)
            done[str(seed)] = {"rotated": accuracy(model, 180), "upright": accuracy(model, 0)}
            results["about"] = ", ".join(today("torch", "equivision_timm").values())
            write(RESULTS, results, table(results), picture(results))
    write(RESULTS, results, table(results), picture(results))


if __name__ == "__main__":
    main()
