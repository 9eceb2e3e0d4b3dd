"""ELPV, 2,624 electroluminescence images of solar cells from 44 modules, defective or not.

Each cell has the probability of a defect that experts gave it, 0, 1/3, 2/3 or 1, and its kind of wafer. From the PyPI
package `elpv-dataset` (CC-BY-NC-SA); no image of it is written. Recipe of Deitsch et al., Automatic Classification of
Defective Photovoltaic Module Cells in Electroluminescence Images (2019): a quarter for the test, stratified by
probability and kind of wafer; defective means p > 1/2. The files lie in the order of the modules, so that a random
split has cells of a module on both sides; a second split has them on one.

The loss is the cross-entropy to p itself. Settings of the fine-tuned network were chosen on cells that no test part
has: scripts/benchmarks/real_attempts.md.
"""

from functools import partial

import torch
import torch.nn.functional as F
from real_training import ALL, ONE, VIEWS, Data, Row, Task, lit, pretrained, random_split, scratch

from equivision_timm.layers.views import act_each, shrink

MODULE = 72  # cells of a module at most


def elpv() -> Data:
    """The 2,624 cells in the order of the files; strata 0 to 3 are monocrystalline, 4 to 7 polycrystalline."""
    from elpv_dataset.utils import load_dataset

    images, probability, wafer = load_dataset()
    targets = torch.tensor(probability.tolist())
    strata = (3 * targets).round().long() + 4 * torch.from_numpy(wafer == "poly")
    return Data(torch.from_numpy(images)[:, None], targets, strata, groups=torch.arange(len(targets)))


def block_split(data: Data, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices: a quarter of each wafer's images in one block for the test; those of modules that it may cut in none."""
    generator = torch.Generator().manual_seed(seed)
    wafers = data.strata // 4
    train, test = [], []
    for wafer in wafers.unique():
        members = (wafers == wafer).nonzero()[:, 0]
        size = round(len(members) / 4)
        first = int(torch.randint(len(members) - size, (), generator=generator))
        test.append(members[first : first + size])
        train += [members[: max(0, first - MODULE)], members[first + size + MODULE :]]
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, 1, H, W] -> [N, 1, size, size] in -1 ... 1."""
    return torch.cat([shrink(batch.float(), size) / 127.5 - 1 for batch in images.split(64)])


def augmented(x: torch.Tensor, moved: bool, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 1, n, n] shifted by up to n / 24 pixels, with another brightness and contrast, and moved by D4."""
    n, reach = x.shape[-1], x.shape[-1] // 24
    x = F.pad(x, [reach] * 4, mode="reflect")
    places = torch.randint(2 * reach + 1, (len(x), 2), generator=generator).tolist()
    x = torch.stack([image[:, i : i + n, j : j + n] for image, (i, j) in zip(x, places, strict=True)])
    x = lit(x, generator)
    elements = torch.randint(VIEWS, (len(x),), generator=generator)
    return act_each(x, elements, 4) if moved else x


def as_photographed(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """Borders of cells that are rotated by oblique angles look like cracks."""
    assert degrees == 0
    return x


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], targets)


def scores(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Accuracy at probability 1/2 and area under the ROC curve, per cent, of logits [N, 1]."""
    defective, logits = targets > 0.5, logits[:, 0]
    accuracy = ((logits > 0) == defective).double().mean()
    difference = logits[defective][:, None] - logits[~defective]
    area = (difference.sign() + 1).double().mean() / 2
    return [round(100 * accuracy.item(), 2), round(100 * area.item(), 2)]


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
TASK = Task(
    title="Solar cells",
    text="ELPV: 2,624 cells, defective or not: accuracy and area under the ROC curve. VGG-19 with ImageNet weights at "
    "300 pixels: 88.4, area 94.4 (Deitsch et al., 2019). From scratch 30 epochs (33 of the wide one), lite0 8 at "
    "129 pixels and 10 at 224. [How settings were chosen](real_attempts.md).",
    reference=(88.42, "VGG-19 at 300 px (2019)"),
    rows=ROWS,
    lines={
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
    },
    splits={"random": random_split, "blocks": block_split},
    split_titles={
        "random": "Random split, as Deitsch et al.: cells of a module on both sides",
        "blocks": "Split by blocks: modules on one side",
    },
    prepare=resized,
    augment=augmented,
    pose=as_photographed,
    angles=(),
    loss=loss,
    scores=scores,
    figures=("accuracy", "area"),
)
