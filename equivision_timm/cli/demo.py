"""The command `demo`: rotated handwritten digits, classified by equivariant and plain networks.

All weights are in the package, trained on the same digits; the ResNets have about as many parameters. The digits of
the demo were held out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from equivision_timm.cli.options import Parsers, add_command, aligned
from equivision_timm.errors import one_line
from equivision_timm.files import write_file
from equivision_timm.models import fuse
from equivision_timm.models.variants import DIGITS
from equivision_timm.rotation import rotate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["classify", "load_digits", "measure", "register", "turn"]


def register(commands: Parsers) -> None:
    text = "classify rotated digits with equivariant and plain networks"
    more = """Prints a table of accuracies at 24 angles and a summary, and draws a picture. Networks and digits
        are in the package; less than a minute on two cores."""
    parser = add_command(commands, "demo", run, text, more)
    text = "picture to write (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("equivision_demo.png"), metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Print the table and write the picture; returns the exit status."""
    measure(args.out)
    return 0


@dataclass(frozen=True)
class Network:
    """A network of the comparison."""

    title: str  # of its column
    kind: str  # description in words
    model: str  # its name
    file: str  # its weights in the package
    colour: str = ""  # of its curve; '' if it is not in the picture
    rotations: int = 1  # its logits are averaged over so many rotations of an image, by multiples of 90 degrees


NETWORKS = (
    Network("C8 af", "equivariant, alias-free", "test_c8resnetaf", "test_c8resnetaf", "#0072b2"),
    Network("C8", "equivariant", "test_c8resnet", "test_c8resnet", "#56b4e9"),
    Network("D4 ViT", "equivariant vision transformer", "test_d4vit", "test_d4vit"),
    Network("ConvNeXt", "equivariant ConvNeXt", "test_d4convnext", "test_d4convnext"),
    Network("plain", "no symmetry", "test_c1resnet", "test_c1resnet", "#d55e00"),
    Network("rotated", "trained with all rotations", "test_c1resnet", "test_c1resnet_rotated", "#009e73"),
    Network("averaged", "mean of four rotations", "test_c1resnet", "test_c1resnet", "#cc79a7", 4),
)
Predictions: TypeAlias = dict[Network, torch.Tensor]  # classes [angles, N]
ANGLES = tuple(range(0, 360, 15))
PICTURED = (2, 5, 6, 7, 9)  # the first held-out digit of each of these classes is shown
_LEGEND = """
same: per cent of the digits that have one class at all quarter turns. At other
angles strides alias, less with a low pass before them (af). An upside-down 6 is
a 9: equivariant networks distinguish them by the handwriting only."""


def measure(out: Path, angles: Sequence[int] = ANGLES, every: int = 1) -> None:
    """Classify every n-th of the digits at all angles (degrees), print the table and write the picture to `out`.

    Raises:
        InputError: `out` cannot be written, or does not end as a picture; found before the work.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from equivision_timm.cli.figures import check_figure_file, figure_bytes, plain_text

    check_figure_file(out)
    digits, labels = (tensor[::every] for tensor in load_digits())
    models = {network.file: _load(network) for network in NETWORKS}
    logits: dict[tuple[str, int], torch.Tensor] = {}  # [N, 10] for each file of weights and angle
    for angle in tqdm(sorted({(angle + 90 * k) % 360 for angle in angles for k in range(4)}), unit="angle"):
        turned = {size: turn(digits, angle, size) for size in {_size(model) for model in models.values()}}
        for file, model in models.items():
            logits[file, angle] = classify(model, turned[_size(model)])
    predictions: Predictions = {}
    for network in NETWORKS:  # quarter turns of a rotated digit are that digit at other angles
        views = [[logits[network.file, (angle + 90 * k) % 360] for k in range(network.rotations)] for angle in angles]
        predictions[network] = torch.stack([torch.stack(seen).mean(0) for seen in views]).argmax(2)
    print(_table(predictions, labels, angles))
    print(_LEGEND)
    drawn = {network: predicted for network, predicted in predictions.items() if network.colour}
    with plain_text():
        figure = Figure(figsize=(13, 6.4), layout=ConstrainedLayoutEngine(h_pad=0.12))
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.2))[0]
        _draw_accuracy(left.add_subplot(projection="polar"), drawn, labels, angles)
        _draw_digits(right.add_subplot(), drawn, digits, labels, angles)
        write_file(out, figure_bytes(figure, out.suffix, dpi=110))
    print(f"\nPicture: {one_line(str(out))}")


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out digits, [500, 28, 28] uint8, white on black, and their labels [500]."""
    tensors = load_file(DIGITS / "held_out.safetensors")
    return tensors["digits"], tensors["labels"].long()


def turn(digits: torch.Tensor, degrees: float, size: int) -> torch.Tensor:
    """Resize digits [N, H, W] uint8 to [N, 1, size, size] in 0 ... 1 and rotate them counter-clockwise.

    The corners are filled with black, like the background of the digits.
    """
    images = F.interpolate(digits[:, None] / 255, size=(size, size), mode="bilinear", antialias=True)
    margin = size // 4  # more than (sqrt(2) - 1) / 2 of the size: no corner reaches beyond the border
    return rotate(F.pad(images, [margin] * 4), degrees)[..., margin:-margin, margin:-margin]


def _load(network: Network) -> nn.Module:
    weights = str(DIGITS / f"{network.file}.safetensors")
    return fuse(timm.create_model(network.model, num_classes=10, checkpoint_path=weights).eval())


def _size(model: nn.Module) -> int:
    """Pixels of a side."""
    return model.pretrained_cfg["input_size"][-1]  # type: ignore[index]


@torch.inference_mode()
def classify(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits [N, 10] of images [N, 1, size, size] of `turn`."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    images = images.expand(-1, cfg["input_size"][0], -1, -1)  # grey as RGB: [N, 3, size, size]
    return torch.cat([model(batch) for batch in ((images - mean) / std).split(100)])


def _accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Percentage of correct predictions [..., N], per angle."""
    return 100 * (predicted == labels).double().mean(-1)


def _table(predictions: Predictions, labels: torch.Tensor, angles: Sequence[int]) -> str:
    """A column for each network."""
    correct = torch.stack([_accuracy(predicted, labels) for predicted in predictions.values()])  # [networks, angles]
    quarters = torch.stack([*predictions.values()])[:, [angle % 90 == 0 for angle in angles]]  # [networks, turns, N]
    same = 100 * (quarters == quarters[:, :1]).all(1).double().mean(1)
    rows = [*zip([f"{angle}°" for angle in angles], correct.unbind(1), strict=True)]
    rows += [("mean", correct.mean(1)), ("worst", correct.amin(1)), ("same", same)]
    cells = [[title, *(f"{percent:.1f}" for percent in row.tolist())] for title, row in rows]
    kinds = aligned([[network.title, network.model, network.kind] for network in predictions], left=(0, 1, 2))
    table = aligned([["angle", *(network.title for network in predictions)], *cells], left=())
    return f"\n{len(labels)} held-out digits, rotated: per cent correct\n\n{kinds}\n\n{table}"


def _draw_accuracy(axes: "Axes", predictions: Predictions, labels: torch.Tensor, angles: Sequence[int]) -> None:
    """Polar plot of the accuracy against the angle of the digits."""
    closed = torch.tensor([*angles, angles[0]]).deg2rad()
    for network, predicted in predictions.items():
        accuracy = _accuracy(predicted, labels)
        label = f"{network.title}, {network.kind}: {accuracy.mean():.1f} %, at worst {accuracy.min():.1f} %"
        radius = torch.cat([accuracy, accuracy[:1]])
        axes.plot(closed, radius, "o-", color=network.colour, label=label, markersize=4, linewidth=2)
        axes.fill(closed, radius, color=network.colour, alpha=0.08)
    axes.set(theta_zero_location="N", ylim=(0, 100), yticks=(25, 50, 75, 100), rlabel_position=67.5)
    axes.set_yticklabels(["25 %", "50 %", "75 %", ""], color="0.4", fontsize=8)
    axes.set_title("Accuracy on digits rotated by every angle", fontweight="bold", fontsize=13, pad=16)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False, fontsize=11)


def _draw_digits(
    axes: "Axes", predictions: Predictions, digits: torch.Tensor, labels: torch.Tensor, angles: Sequence[int]
) -> None:
    """A row per digit, a column per angle, the predictions of all networks below each image."""
    from matplotlib.patches import Patch

    shown = range(0, len(angles), max(1, len(angles) // 8))
    chosen = torch.stack([(labels == label).nonzero()[0, 0] for label in PICTURED])
    row_height = 1.42  # in widths of an image: the image, and the answers below it
    for column, index in enumerate(shown):
        axes.text(column + 0.5, -0.12, f"{angles[index]}°", ha="center", va="bottom", color="0.3")
        for row, image in enumerate(turn(digits[chosen], angles[index], size=65)):
            top = row * row_height
            extent = (column + 0.04, column + 0.96, top + 0.96, top + 0.04)
            axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="bilinear")
            for place, (network, predicted) in enumerate(predictions.items()):
                answer = int(predicted[index, chosen[row]])
                x = column + 0.06 + 0.88 * (place + 0.5) / len(predictions)  # a gap between the columns
                colour, right = network.colour, answer == labels[chosen[row]]  # filled if it is correct
                box = {"boxstyle": "round,pad=0.2", "facecolor": colour if right else "white", "edgecolor": colour}
                style = {"color": "white" if right else colour, "fontweight": "bold", "fontsize": 6.5}
                axes.text(x, top + 1.13, str(answer), ha="center", va="center", bbox=box, **style)
    axes.set(xlim=(0, len(shown)), ylim=(len(PICTURED) * row_height, -0.1), aspect="equal")
    axes.axis("off")
    axes.set_title("Predictions: filled if correct, hollow if wrong", fontweight="bold", fontsize=13, pad=16)
    squares = [Patch(color=network.colour, label=network.title) for network in predictions]
    size = {"ncols": len(squares), "fontsize": 11, "handlelength": 1, "handleheight": 1}
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False}
    axes.legend(handles=squares, title="squares, from left to right", **place, **size)
