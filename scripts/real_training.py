"""Training and test of the networks of real_data.py, whatever the set of images."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from adapted_table import lite0
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

from equivision_timm.layers.views import act, shrink
from equivision_timm.models import Symmetrized

VIEWS, BATCH_SIZE = 8, 32  # elements of D4; images of a step
ONE, ALL = "one view", "all views"  # that a prediction takes
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [N, K] and targets [N] -> scalar


@dataclass(frozen=True)
class Data:
    """Images uint8 [N, C, H, W] and, [N] each, their targets, strata and groups; a split parts no group."""

    images: torch.Tensor
    targets: torch.Tensor
    strata: torch.Tensor
    groups: torch.Tensor


def random_split(data: Data, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of training and test images: a quarter of the groups of each stratum is for the test."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(data.strata), dtype=torch.bool)
    for stratum in data.strata.unique():
        groups = data.groups[data.strata == stratum].unique()
        chosen = groups[torch.randperm(len(groups), generator=generator)[: round(len(groups) / 4)]]
        test |= torch.isin(data.groups, chosen)
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


class ThreeChannels(nn.Module):
    """A network of colour images, given those or grey ones [B, 1, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def pretrained(classes: int = 1) -> nn.Module:
    """ImageNet's lite0, symmetrized."""
    network = lite0()
    network.reset_classifier(classes)
    return ThreeChannels(Symmetrized(network, "d4", train_views=1)).to(memory_format=torch.channels_last)


def scratch(name: str, in_chans: int = 1, num_classes: int = 1, **arguments: Any) -> nn.Module:
    return timm.create_model(name, in_chans=in_chans, num_classes=num_classes, **arguments)


@dataclass(frozen=True)
class Row:
    """A network and its training.

    Attributes:
        create: makes the network.
        size: pixels of a side.
        moved: training images are rotated and reflected at random.
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


@dataclass(frozen=True, eq=False)
class Task:
    """A set of images, and how networks learn it and are tested.

    Attributes:
        title, text: of its part of the tables.
        reference: a published accuracy for the picture, and whose.
        rows: the networks.
        lines: of the table: a row, and the views that a prediction takes.
        splits: indices of training and test images by `Data` and seed.
        split_titles: of the tables.
        prepare: uint8 images [N, C, H, W] and pixels of a side -> images as `augment` and `pose` take them.
        augment: batch, whether it is moved, generator -> what the network gets in training.
        pose: batch, degrees -> what it gets in a test.
        angles: oblique ones, tested besides 0, in degrees.
        loss: by logits [N, K] and targets [N].
        scores: two figures, per cent, by the same.
        figures: their names.
    """

    title: str
    text: str
    reference: tuple[float, str] | None
    rows: Mapping[str, Row]
    lines: Mapping[str, tuple[str, str]]
    splits: Mapping[str, Callable[[Data, int], tuple[torch.Tensor, torch.Tensor]]]
    split_titles: Mapping[str, str]
    prepare: Callable[[torch.Tensor, int], torch.Tensor]
    augment: Callable[[torch.Tensor, bool, torch.Generator], torch.Tensor]
    pose: Callable[[torch.Tensor, float], torch.Tensor]
    angles: tuple[float, ...]
    loss: Loss
    scores: Callable[[torch.Tensor, torch.Tensor], list[float]]
    figures: tuple[str, str]


def lit(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, C, n, n] in -1 ... 1 with another contrast and brightness."""
    contrast, brightness = 0.2 * (2 * torch.rand(2, len(x), 1, 1, 1, generator=generator) - 1)
    return (x + 1) * contrast.exp() + brightness - 1


def train(row: Row, task: Task, images: torch.Tensor, targets: torch.Tensor, seed: int, title: str = "") -> nn.Module:
    """The network trained on prepared images, in eval mode."""
    random_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = row.create().train()
    if row.epochs == 0:
        return fit_classifier(model.eval(), task.pose(images, 0), targets, task.loss)
    network = model.network if isinstance(model, ThreeChannels) else model
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
            x = task.augment(images[chosen], row.moved, generator)
            x = shrink(x, row.small) if epoch < row.small_epochs else x
            loss = task.loss(model(x), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def fit_classifier(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, loss: Loss) -> nn.Module:
    """Logistic regression on the mean embedding of the eight views, its weight decay chosen on a quarter held out."""
    network = model.network.backbone
    head, network.classifier = network.classifier, nn.Identity()
    x = torch.cat([model(batch) for batch in tqdm(images.split(BATCH_SIZE), "embeddings")])  # [N, 1280]
    network.classifier = head
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / deviation

    @torch.enable_grad()
    def fit(part: slice, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = torch.zeros_like(head.weight), torch.zeros_like(head.bias)  # [K, 1280], [K]
        optimizer = torch.optim.LBFGS(
            [weight.requires_grad_(), bias.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(x[part] @ weight.T + bias, targets[part]) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return weight.detach(), bias.detach()

    held_out, rest = slice(0, None, 4), torch.arange(len(x)) % 4 > 0
    losses = {}
    for decay in (1e-3, 1e-2, 1e-1):
        weight, bias = fit(rest, decay)
        losses[decay] = loss(x[held_out] @ weight.T + bias, targets[held_out])
    weight, bias = fit(slice(None), min(losses, key=losses.get))
    head.weight.copy_(weight / deviation)
    head.bias.copy_(bias - weight @ (mean / deviation))
    return model


@torch.inference_mode()
def view_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[8, N, K]: logits of each image in each of the eight orientations; of a symmetrized network, its backbone's."""
    network = ThreeChannels(model.network.backbone) if isinstance(model, ThreeChannels) else model
    rows = [[network(act(x, g, 4)) for x in images.split(BATCH_SIZE)] for g in range(VIEWS)]
    return torch.stack([torch.cat(row) for row in rows])


@torch.inference_mode()
def drift(model: nn.Module, images: torch.Tensor) -> float:
    """The largest change of a logit when an image is rotated by quarter turns or reflected."""
    return max((model(act(images, g, 4)) - model(images)).abs().max().item() for g in range(1, VIEWS))


def run(row: Row, task: Task, data: Data, split: str, seed: int, title: str = "") -> dict[str, Any]:
    """Train, test, and describe one network."""
    train_part, test_part = task.splits[split](data, seed)
    images = task.prepare(data.images, row.size)
    start = time.process_time()
    model = train(row, task, images[train_part], data.targets[train_part], seed, title)
    seconds = time.process_time() - start
    targets = data.targets[test_part]

    def tested(angles: tuple[float, ...]) -> dict[str, list[list[float]]]:
        logits = [view_logits(model, task.pose(images[test_part], angle)) for angle in angles]  # [8, N, K] each
        views = [task.scores(view, targets) for views in logits for view in views]
        return {"views": views, "averaged": [task.scores(views.mean(0), targets) for views in logits]}

    return {
        **tested((0,)),
        **({"oblique": tested(task.angles)} if task.angles else {}),
        "drift": drift(model, task.pose(images[test_part][:16], 0)),
        "training seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pixels": row.size,
    }
