"""The command `show`: one picture of an image at several angles, the predictions, and the feature maps.

The picture shows, for every model and angle, the rotated image with the prediction, one feature map, the same map
rotated back, and its distance from the upright one, which an equivariant network f, f(g x) = g f(x), makes zero:

    |g^-1 f(g x) - f(x)| / |f(x)|        in a disc of 0.8 times the inscribed radius, as in `testing.angle_error`

The last row shows the difference relative to the range of the upright map, with one linear scale for all models. The
map of an equivariant model is the mean over one regular field, a scalar map; that of another model is one channel.
Shown is the one with the largest variance over the upright image.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equivision_timm.cli.models import Loaded, class_titles, load, short_name
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options
from equivision_timm.data import open_rgb, preparation
from equivision_timm.errors import one_line, shortened
from equivision_timm.files import write_file
from equivision_timm.groups import Group
from equivision_timm.rotation import inscribed_circle, rotate

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["map_error", "register", "scalar_maps"]

_DPI = 100
_COLUMN, _HEIGHT = 1.75, 9.0  # inches
_PART = 0.8  # of the inscribed radius, inside which maps are compared
_LEAST = 0.01  # the scale of the differences ends there at least: rounding errors stay dark


def register(commands: Parsers) -> None:
    text = "one picture: an image at several angles, the predictions, and the feature maps"
    more = """Below each rotated image: a feature map, the map rotated back, and its difference from the map of
        the upright image, of an equivariant network zero wherever the rotation permutes the pixels. The
        percentage above the difference is its norm, relative to that of the map; predictions are the softmax of
        the logits."""
    parser = add_command(commands, "show", run, "{out} was not written", text, more)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture file")
    add_model(parser, several=True)
    add_options(parser, "num-classes", "class-map", "angles", "size", angles="0,45,90,180")
    add("--level", type=int, default=1, metavar="N", help="which feature map, 0 for the stem (default: %(default)s)")
    text = "picture to write (default: %(default)s)"
    add("--out", type=Path, default=Path("equivision_show.png"), metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Draw the picture; returns the exit status."""
    from matplotlib.figure import Figure

    from equivision_timm.cli.figures import check_figure_file, figure_bytes, plain_text

    models, angles = list(dict.fromkeys(args.models)), args.angles
    width = (_COLUMN * len(angles) + 0.5) * len(models)  # inches
    check_figure_file(args.out, make_folders=True)
    picture = open_rgb(args.image)
    blocks: list[list[_Column]] = []
    for spec in models:
        loaded = load(spec, args.size, args.num_classes, args.model_kwargs)
        loaded.note_inexact_size()
        blocks.append(_measure(loaded, preparation(loaded.config)(picture), angles, args.level, args.class_map))
    most = max(_LEAST, *(column.difference.max() for columns in blocks for column in columns))
    with plain_text():
        figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
        frames = figure.subfigures(1, len(models), squeeze=False, wspace=0.03)[0]
        for frame, spec, columns in zip(frames, models, blocks, strict=True):
            _draw_model(frame, columns, most)
            name = shortened(short_name(spec).partition("=")[0], 20 * len(angles))
            title = f"{name}, {columns[0].image.shape[0]} px\nfeature map: {columns[0].name}"
            frame.suptitle(title, fontsize=14, fontweight="bold")
        write_file(args.out, figure_bytes(figure, args.out.suffix, _DPI))
    print(one_line(str(args.out)))
    return 0


def scalar_maps(model: Any, images: torch.Tensor, level: int) -> torch.Tensor:
    """Feature maps [B, maps, h, w] that should only rotate with the image: means over regular fields, or channels."""
    (maps,) = model.forward_intermediates(images, indices=[level], intermediates_only=True)
    group = getattr(model, "group", None)
    return maps if group is None else maps.unflatten(1, (-1, Group.from_name(group).order)).mean(2)  # [B, m, h, w]


def map_error(rotated_back: torch.Tensor, upright: torch.Tensor) -> float:
    """|rotated_back - upright| / |upright| of maps [h, w], without their border."""
    inside = inscribed_circle(upright, _PART)
    return ((rotated_back - upright)[inside].norm() / upright[inside].norm()).item()


@dataclass(frozen=True)
class _Column:
    """One model at one angle."""

    title: str  # the angle and the prediction
    image: np.ndarray  # the rotated image, [H, W, C] or [H, W]
    map: np.ndarray  # its feature map, [h, w]
    name: str  # of the map: its layer, and its number
    returned: np.ma.MaskedArray  # the map rotated back, without its border
    difference: np.ma.MaskedArray  # from the upright map, relative to its range, without its border
    error: float  # see `map_error`
    limits: tuple[float, float]  # smallest and largest value of the upright map


@torch.inference_mode()
def _measure(
    loaded: Loaded, upright: torch.Tensor, angles: list[float], level: int, names: list[str] | None
) -> list[_Column]:
    """The columns of a model, one for each angle, for an image [C, H, W]."""
    model: Any = loaded.model
    loaded.try_image(upright)
    maps = scalar_maps(model, upright[None], level)[0]  # [maps, h, w]
    count, chosen = len(maps), int(maps.flatten(1).var(1, correction=0).argmax())
    reference = maps[chosen]
    low, high = reference.min().item(), reference.max().item()
    extent = max(high - low, torch.finfo(reference.dtype).tiny)  # a flat map has no range
    layer = model.feature_info[level]["module"] if hasattr(model, "feature_info") else f"level {level}"
    kind = "field" if getattr(model, "group", "c1") != "c1" else "channel"
    titles, columns = class_titles(loaded.class_names(names)), []
    for angle in angles:
        image = rotate(upright[None], angle)  # [1, C, H, W]
        prediction, found = model(image).softmax(1)[0], scalar_maps(model, image, level)[0, chosen]
        returned, best = rotate(found[None, None], -angle)[0, 0], int(prediction.argmax())
        columns.append(
            _Column(
                title=f"{angle:g}°\n{titles[best]}\n{prediction[best]:.0%}",
                image=_pixels(image[0], loaded.config),
                map=found.numpy(),
                name=f"{layer}, {kind} {chosen + 1} of {count}",
                returned=_masked(returned),
                difference=_masked((returned - reference).abs() / extent),
                error=map_error(returned, reference),
                limits=(low, high),
            )
        )
    return columns


def _draw_model(block: "SubFigure", columns: list[_Column], most: float) -> None:
    """Four rows, a column per angle: image, map, map rotated back, difference; below it its scale, from 0 to `most`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    norm = Normalize(0, most)
    grid = block.add_gridspec(5, len(columns), height_ratios=(1, 1, 1, 1, 0.09))
    axes = [[block.add_subplot(grid[row, place]) for place in range(len(columns))] for row in range(4)]
    for place, column in enumerate(columns):
        image, found, returned, difference = (row[place] for row in axes)
        low, high = column.limits
        image.imshow(column.image, cmap="gray")
        image.set_title(column.title, fontsize=13)
        found.imshow(column.map, cmap="viridis", vmin=low, vmax=high)
        returned.imshow(column.returned, cmap="viridis", vmin=low, vmax=high)
        difference.imshow(column.difference, cmap="inferno", norm=norm)
        difference.set_title(f"{column.error:.1%}", fontsize=13)
    for row, label in zip(axes, ("image", "feature map", "rotated back", "difference"), strict=True):
        row[0].set_ylabel(label, fontsize=13)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    scale = block.colorbar(ScalarMappable(norm, "inferno"), cax=block.add_subplot(grid[4, :]), orientation="horizontal")
    scale.set_ticks([most * part for part in (0, 0.25, 0.5, 0.75, 1)])
    scale.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0 if most > 0.2 else 2))
    scale.ax.tick_params(labelsize=12)
    scale.set_label("difference, relative to the range of the upright map", fontsize=12)


def _masked(values: torch.Tensor) -> np.ma.MaskedArray:
    return np.ma.masked_array(values.numpy(), ~inscribed_circle(values, _PART).numpy())


def _pixels(image: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    """A normalised image [C, H, W] as matplotlib draws it, [H, W, C] or [H, W], in 0 ... 1."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
