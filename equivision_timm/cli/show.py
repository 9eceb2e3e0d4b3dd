"""One picture for a slide: an image at several angles, what the models predict, and whether a feature map turns along.

For an equivariant network f and a rotation g, f(g x) = g f(x): turning the map of the turned image back gives the map
of the upright image. The picture shows, for every model and angle, the turned image with the prediction, one feature
map, the same map turned back, and its distance from the upright one:

    |g^-1 f(g x) - f(x)| / |f(x)|        inside the circle that every turn keeps

The last row shows where it differs, in parts of the range of the upright map, to one scale for all models, on which
small values are drawn apart.

The map of an equivariant model is the mean over one regular field, which is a plain scalar map; that of another model
is one channel. Shown is the field or channel with the largest variance over the upright image.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from equivision_timm.arguments import InputError, check_number, shortened
from equivision_timm.cli.figures import check_figure_file, plain_text, save_figure
from equivision_timm.cli.loading import check_model_name, short_name
from equivision_timm.cli.trained import class_names, data_config, load_trained
from equivision_timm.cli.trial import MOST_CLASSES, MOST_PIXELS, check_memory, explained, try_model
from equivision_timm.groups import Group
from equivision_timm.images.from_timm import picture_mode, preparation
from equivision_timm.images.pictures import PictureError, open_rgb
from equivision_timm.images.rotation import inscribed_circle, rotate

__all__ = ["map_error", "scalar_maps", "show"]

_DPI = 100
_COLUMN, _HEIGHT = 1.75, 9.0  # inches
_LONGEST = 16  # letters of a class name that fit over a column
_LEAST = 0.01  # the scale of the differences ends there at least: rounding errors stay dark
_WIDEST = 160  # inches; WebP holds 16383 pixels


def show(
    image: str,
    models: list[str],
    angles: list[float],
    out: str = "equivision_show.png",
    level: int = 1,
    size: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Draw the picture into the file `out`.

    Args:
        image: picture file.
        models: `NAME` or `NAME=CHECKPOINT`.
        angles: in degrees, counter-clockwise.
        out: PNG, PDF, SVG, ... file; folders that are missing above it are made.
        level: which feature map, as in timm's `forward_intermediates`; 0 is the stem.
        size: side of the image in pixels; that of the checkpoint's training, or the model's own, where None.
        num_classes: classes of the models; those that a checkpoint shows, or their own, where None.

    Raises:
        InputError: the image cannot be read, a model or the level does not exist, the picture cannot be written.
        OSError: the picture could not be written after all; the old one is untouched.
    """
    models = list(dict.fromkeys(models))
    width = (_COLUMN * len(angles) + 0.5) * len(models)  # inches
    if width > _WIDEST:
        raise InputError(
            f"{len(angles)} angles of {len(models)} model(s) make a picture of {width * _DPI:.0f} pixels, more than "
            f"{_WIDEST * _DPI}: give fewer --angles"
        )
    check_number("--size", size, 1, MOST_PIXELS)
    check_number("--num-classes", num_classes, 1, MOST_CLASSES)
    for name in models:
        check_model_name(name)
    check_figure_file(Path(out), make_folders=True)
    try:
        picture = open_rgb(image)
    except PictureError as error:
        raise InputError(f"cannot read the image: {error}") from error
    columns = [_measure(name, num_classes, picture, angles, level, size) for name in models]
    most = max(_LEAST, *(column.difference.max() for found in columns for column in found))
    with plain_text():
        figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
        blocks = figure.subfigures(1, len(models), squeeze=False, wspace=0.03)
        for block, name, found in zip(blocks[0], models, columns, strict=True):
            _draw_model(block, found, most)
            shown = f"{found[0].image.shape[0]} px, level {level}"
            title = f"{shortened(short_name(name).partition('=')[0], 20 * len(angles))}, {shown}"
            block.suptitle(title, fontsize=15, fontweight="bold")
        save_figure(figure, Path(out), _DPI)


def scalar_maps(model: nn.Module, images: torch.Tensor, level: int) -> torch.Tensor:
    """Feature maps [B, maps, h, w] that a rotation should only turn: the mean over each regular field, or channels."""
    forward = getattr(model, "forward_intermediates", None)
    if forward is None:
        raise InputError(f"{type(model).__name__} gives no feature maps (timm's forward_intermediates): use another")
    try:
        (maps,) = forward(images, indices=[level], intermediates_only=True)
    except (AssertionError, IndexError) as error:
        raise InputError(f"{type(model).__name__} has no feature map --level {level}: {error}") from error
    group = getattr(model, "group", None)
    return maps if group is None else maps.unflatten(1, (-1, Group.from_name(group).order)).mean(2)  # [B, m, h, w]


def map_error(turned_back: torch.Tensor, upright: torch.Tensor) -> float:
    """|turned_back - upright| / |upright| inside the inscribed circle of maps [h, w]."""
    inside = inscribed_circle(upright)
    return ((turned_back - upright)[inside].norm() / upright[inside].norm()).item()


@dataclass(frozen=True)
class _Column:
    """One model at one angle.

    Attributes:
        title: the angle and the prediction.
        image: the turned image as it looks, [H, W, C] or [H, W].
        map: its feature map, [h, w].
        returned: the map turned back, outside the circle masked.
        difference: from the upright map, in parts of its range, outside the circle masked.
        error: see `map_error`.
        limits: smallest and largest value of the upright map.
    """

    title: str
    image: np.ndarray
    map: np.ndarray
    returned: np.ma.MaskedArray
    difference: np.ma.MaskedArray
    error: float
    limits: tuple[float, float]


def _measure(
    name: str, num_classes: int | None, picture: Image.Image, angles: list[float], level: int, size: int | None
) -> list[_Column]:
    """What the picture shows of a model, by angle."""
    model, training = load_trained(name, num_classes)
    config = data_config(model, training, size)
    side = config["input_size"][-1]
    check_memory("--size", len(angles), side)
    with explained(name, 1, side, torch.device("cpu"), "lower --size"), torch.inference_mode():
        try_model(name, model, lambda: _prepare(picture, config), side, torch.device("cpu"))
        upright = _prepare(picture, config)[None]  # [1, C, H, W]
        images = [rotate(upright, angle) for angle in angles]
        predictions = [model(x).softmax(1)[0] for x in images]
        reference = scalar_maps(model, upright, level)[0]  # [maps, h, w]
        chosen = int(reference.flatten(1).var(1, correction=0).argmax())
        maps = [scalar_maps(model, x, level)[0, chosen] for x in images]  # [h, w]
    reference = reference[chosen]
    limits = reference.min().item(), reference.max().item()
    extent = max(limits[1] - limits[0], torch.finfo(reference.dtype).tiny)  # a flat map has no range
    titles, columns = _class_titles(name, model), []
    for angle, image, prediction, found in zip(angles, images, predictions, maps, strict=True):
        returned = rotate(found[None, None], -angle)[0, 0]
        best = int(prediction.argmax())
        columns.append(
            _Column(
                title=f"{angle:g}°\n{titles[best]}\n{prediction[best]:.0%}",
                image=_pixels(image[0], config),
                map=found.numpy(),
                returned=_masked(returned),
                difference=_masked((returned - reference).abs() / extent),
                error=map_error(returned, reference),
                limits=limits,
            )
        )
    return columns


def _draw_model(block: SubFigure, columns: list[_Column], most: float) -> None:
    """Four rows, a column per angle: image, map, map turned back, difference; below it its scale, from 0 to `most`."""
    norm = PowerNorm(0.5, 0, most)
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
    for row, label in zip(axes, ("image", "feature map", "turned back", "difference"), strict=True):
        row[0].set_ylabel(label, fontsize=13)
        for axis in row:
            _bare(axis)
    scale = block.colorbar(ScalarMappable(norm, "inferno"), cax=block.add_subplot(grid[4, :]), orientation="horizontal")
    scale.set_ticks([most * part for part in (0, 0.05, 0.25, 0.5, 1)])
    scale.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0 if most > 0.2 else 2))
    scale.ax.tick_params(labelsize=12)
    scale.set_label("difference, of the range of the upright map", fontsize=12)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _prepare(picture: Image.Image, config: dict) -> torch.Tensor:
    """The picture as the model of a timm data config wants it, [C, H, W].

    Raises:
        ValueError: the model takes neither grey nor RGB images.
    """
    return preparation(config)(picture.convert(picture_mode(config)))


def _masked(values: torch.Tensor) -> np.ma.MaskedArray:
    return np.ma.masked_array(values.numpy(), ~inscribed_circle(values).numpy())


def _pixels(image: torch.Tensor, config: dict) -> np.ndarray:
    """A normalised image [C, H, W] as it looks, [H, W, C] or [H, W], in 0 ... 1."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()


def _class_titles(spec: str, model: nn.Module) -> list[str]:
    """What a picture is read as, by class: its name, ImageNet's first word, else the number."""
    names = class_names(spec, model, None)
    titles = [f"class {name}" if name == str(index) else name.split(",")[0] for index, name in enumerate(names)]
    return [shortened(title, _LONGEST) for title in titles]
