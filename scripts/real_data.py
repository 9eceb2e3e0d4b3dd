"""Solar cells, defective or not, in any orientation: networks from scratch and a pretrained one, plain and equivariant.

    pip install '.[real]'
    python scripts/real_data.py              # one seed, networks from scratch at 97 pixels: 20 minutes of one core
    python scripts/real_data.py --full       # all rows, seeds and splits: hours
    python scripts/real_data.py --table      # train nothing, write the table and the picture again

Data: ELPV, see solar_cells.py; no image of it is written. Recipe of Deitsch et al., Automatic Classification of
Defective Photovoltaic Module Cells in Electroluminescence Images (2019): a quarter for the test, stratified by
probability and kind of wafer; defective means p > 1/2. A second split has the cells of a module on one side.

Every row sees the same images in the same order for a seed. The loss is the cross-entropy to p itself. A test image is
seen in all eight orientations of the square (quarter turns and reflections), one at a time, and averaged over them.
Results are added to scripts/benchmarks/real.json after each run; the same call goes on where it was interrupted.
Settings of the fine-tuned network were chosen on cells that no test part has: scripts/benchmarks/real_attempts.md.

On Linux training takes .6 of the time where glibc keeps the memory that it is given back:
`MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python scripts/real_data.py`.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from adapted_table import lite0
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from solar_cells import SPLIT_TITLES, SPLITS, Data, elpv, resized
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

import equivision_timm
from equivision_timm.layers.views import act, act_each, shrink
from equivision_timm.models import Symmetrized

RESULTS = Path(__file__).parent / "benchmarks" / "real.json"
VIEWS, BATCH_SIZE = 8, 32  # elements of D4; images of a step


class Grey(nn.Module):
    """A network of colour images, given grey ones [B, 1, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def pretrained() -> nn.Module:
    """ImageNet's lite0, symmetrized, one logit."""
    network = lite0()
    network.reset_classifier(1)
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
        epochs: over the training images, after `small_epochs`; 0 fits only the classifier of a pretrained network.
        small: pixels of a side in the first `small_epochs`.
        learning_rate: the largest, of AdamW under a cosine.
        layer_decay: factor of the learning rate from block to block, towards the image.
    """

    create: Callable[[], nn.Module]
    size: int = 97
    moved: bool = True
    epochs: int = 30
    small: int = 0
    small_epochs: int = 0
    learning_rate: float = 3e-3
    layer_decay: float | None = None


TINY = {"depths": (1, 1, 2, 1), "dims": (24, 48, 96, 192)}
ROWS = {
    "plain ResNet": Row(partial(scratch, "test_c1resnet"), moved=False),
    "plain ResNet, D4 augmentation": Row(partial(scratch, "test_c1resnet")),
    "D4 ResNet": Row(partial(scratch, "test_d4resnet"), moved=False),
    "D4 alias-free ResNet": Row(partial(scratch, "test_c8resnetaf", group="d4"), moved=False),
    "D4 ConvNeXt": Row(partial(scratch, "d4convnext_atto", **TINY), size=96, moved=False),
    "D4 ResNet, wide": Row(partial(scratch, "test_d4resnet", width=8), 129, False, 8, small=97, small_epochs=25),
    "lite0, frozen": Row(pretrained, 161, epochs=0),
    "lite0, fine-tuned": Row(
        pretrained, 224, epochs=10, small=129, small_epochs=8, learning_rate=2e-3, layer_decay=0.85
    ),
}
ONE, ALL = "one view", "all views"  # that a prediction takes
LINES = {  # of the table
    "plain ResNet": ("plain ResNet", ONE),
    "plain ResNet, D4 augmentation": ("plain ResNet, D4 augmentation", ONE),
    "the same, mean of 8 views": ("plain ResNet, D4 augmentation", ALL),
    "D4 ResNet": ("D4 ResNet", ONE),
    "D4 alias-free ResNet": ("D4 alias-free ResNet", ONE),
    "D4 ConvNeXt": ("D4 ConvNeXt", ONE),
    "D4 ResNet, twice as wide": ("D4 ResNet, wide", ONE),
    "ImageNet's lite0, frozen, symmetrized": ("lite0, frozen", ALL),
    "lite0 fine-tuned, D4 augmentation": ("lite0, fine-tuned", ONE),
    "lite0 fine-tuned, symmetrized under D4": ("lite0, fine-tuned", ALL),
}


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
    if row.epochs == 0:
        return fit_classifier(model.eval(), images, targets)
    network = model.network if isinstance(model, Grey) else model
    optimizer = create_optimizer_v2(
        network, opt="adamw", lr=row.learning_rate, weight_decay=0.05, layer_decay=row.layer_decay
    )
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


@torch.no_grad()
def fit_classifier(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> nn.Module:
    """Logistic regression on the mean embedding of the eight views, its weight decay chosen on a quarter held out."""
    network = model.network.backbone
    head, network.classifier = network.classifier, nn.Identity()
    x = torch.cat([model(batch) for batch in tqdm(images.split(BATCH_SIZE), "embeddings")])  # [N, 1280]
    network.classifier = head
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / deviation

    @torch.enable_grad()
    def fit(part: slice, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(x[part] @ weight + bias, targets[part])
            value = value + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return weight.detach(), bias.detach()

    held_out, rest = slice(0, None, 4), torch.arange(len(x)) % 4 > 0
    losses = {}
    for decay in (1e-3, 1e-2, 1e-1):
        weight, bias = fit(rest, decay)
        losses[decay] = F.binary_cross_entropy_with_logits(x[held_out] @ weight + bias, targets[held_out])
    weight, bias = fit(slice(None), min(losses, key=losses.get))
    head.weight.copy_((weight / deviation)[None])
    head.bias.copy_(bias - (weight / deviation * mean).sum())
    return model


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
    difference = logits[defective][:, None] - logits[~defective]
    area = (difference.sign() + 1).double().mean() / 2
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


def table(results: dict[str, Any]) -> str:
    """As Markdown: mean over the seeds, and the least and the largest."""
    lines = [
        "# Solar cells",
        "",
        f"Written by `scripts/real_data.py`, {results['about']}. Solar cells, defective or not: accuracy and area "
        "under the ROC curve of the test images, per cent, mean of the seeds (least to largest). Upright: as "
        "photographed; moved: the mean over the seven other orientations of the square. Training in CPU minutes of one "
        "thread: from scratch 30 epochs (33 of the wide one), lite0 8 epochs at 129 pixels and 10 at 224. VGG-19 with "
        "ImageNet weights at 300 pixels: 88.4, area 94.4 (Deitsch et al., 2019). [How lite0's settings were chosen]"
        "(real_attempts.md).",
    ]
    keys = {key.split()[0] for runs in results["runs"].values() for key in runs}
    for split in (name for name in SPLITS if name in keys):
        lines += ["", f"## {SPLIT_TITLES[split]}", ""]
        lines += ["| network | pixels | parameters | training | seeds | upright | moved | area, upright | moved |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        for title, (row, kind) in LINES.items():
            runs = [run for key, run in results["runs"].get(row, {}).items() if key.startswith(split)]
            if runs:
                upright, moved = ([shown(run, kind)[part] for run in runs] for part in (0, 1))
                minutes = statistics.mean(run["training seconds"] for run in runs) / 60
                cells = [title, runs[0]["pixels"], f"{runs[0]['parameters']:,}", f"{minutes:.1f}", len(runs)]
                cells += [ranged([pair[k] for pair in pairs]) for k in (0, 1) for pairs in (upright, moved)]
                lines.append(f"| {' | '.join(map(str, cells))} |")
        missing = {row for row in ROWS if not any(key.startswith(split) for key in results["runs"].get(row, {}))}
        lines += ["", f"Not run: {'; '.join(sorted(missing))}."] if missing else []
    exact = [run["drift"] for title, runs in results["runs"].items() if "plain" not in title for run in runs.values()]
    drift = f"Moving 16 images changes logits of D4 and symmetrized networks by {max(exact, default=0):.0e}."
    lines += ["", drift, "", f"![The random split, a dot for each seed]({RESULTS.stem}.png)"]
    return "\n".join(lines) + "\n"


def shown(run: dict[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """Accuracy and area, upright and moved, of one view or of the mean of all."""
    if kind == "all views":
        return run["averaged"], run["averaged"]
    return run["views"][0], [statistics.mean(view[k] for view in run["views"][1:]) for k in (0, 1)]


def ranged(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.1f}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")


def picture(results: dict[str, Any]) -> Figure:
    """Accuracy of each line of the table on the random split: a filled dot for a seed upright, an open one moved."""
    lines = {title: line for title, line in LINES.items() if line[0] in results["runs"]}
    figure = Figure(figsize=(8.4, 0.6 + 0.36 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, (row, kind) in enumerate(lines.values()):
        for key, run in results["runs"][row].items():
            if key.startswith("random"):
                upright, moved = shown(run, kind)
                axes.plot(moved[0], place + 0.12, "o", mfc="none", mec="#d55e00", ms=7)
                axes.plot(upright[0], place - 0.12, "o", color="#0072b2", ms=6)
    axes.axvline(88.42, color="grey", linewidth=1, linestyle="--")
    axes.text(88.2, -0.7, "VGG-19 at 300 px (2019)", color="grey", ha="right", va="center", fontsize=9)
    axes.plot([], [], "o", color="#0072b2", label="as photographed")
    axes.plot([], [], "o", mfc="none", mec="#d55e00", label="rotated and reflected")
    axes.set(xlabel="accuracy, %", ylim=(len(lines) - 0.5, -1))
    axes.xaxis.set_major_locator(MultipleLocator(5))
    pixels = [next(iter(results["runs"][row].values()))["pixels"] for row, _ in lines.values()]
    axes.set_yticks(range(len(lines)), [f"{title}, {n} px" for title, n in zip(lines, pixels, strict=True)])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    return figure


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": "", "runs": {}}


def save(results: dict[str, Any]) -> None:
    """JSON, table and picture."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))
    picture(results).savefig(RESULTS.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all rows, three seeds, both splits")
    parser.add_argument("--table", action="store_true", help="train nothing, write table and picture")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="these; by default the cheap ones")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 0, or 0 1 2 with --full")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), help="by default random")
    args = parser.parse_args()
    rows = args.rows or [title for title, row in ROWS.items() if args.full or row.size <= 97]
    seeds = args.seeds or ([0, 1, 2] if args.full else [0])
    splits = args.splits or (list(SPLITS) if args.full else ["random"])
    data = None
    for split, seed, title in [] if args.table else itertools.product(splits, seeds, rows):
        key = f"{split} {seed}"
        if key not in load_results()["runs"].get(title, {}):
            data = data or elpv()
            result = run(ROWS[title], data, split, seed, f"{title}, {key}")
            results = load_results()  # another process may have added to it
            results["runs"].setdefault(title, {})[key] = result
            results.setdefault("test images", {})[key] = " ".join(
                map(str, SPLITS[split](data.strata, seed)[1].tolist())
            )
            versions = f"torch {torch.__version__.split('+')[0]}, equivision_timm {equivision_timm.__version__}"
            results["about"] = f"{date.today().isoformat()}, {versions}"
            save(results)
    save(load_results())


if __name__ == "__main__":
    main()
