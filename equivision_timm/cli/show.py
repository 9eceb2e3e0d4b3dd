"""The command `show`: one picture of an image at several angles, the predictions, and the feature maps.

The picture shows, for every model and angle, the rotated image with the prediction, one feature map, the same map
rotated back, and its distance from the upright one, which an equivariant network f, f(g x) = g f(x), makes zero:

    |g^-1 f(g x) - f(x)| / |f(x)|        in a disc of 0.8 times the inscribed radius, as in `testing.angle_error`

The last row shows the difference relative to the range of the upright map, with one linear scale for all models. The
map of an equivariant model is the mean over one regular field, a scalar map; that of another model is one channel.
Shown is the one with the largest variance over the upright image.
"""

import argparse
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
    from matplotlib.colors import Normalize
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
    parser = add_command(commands, "show", run, text, more)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="picture file")
    add_model(parser, several=True)
    add_options(parser, "num-classes", "class-map", "angles", "size", angles="0,45,90,180")
    add("--level", type=int, default=1, metavar="N", help="which feature map, 0 for the stem (default: %(default)s)")
    text = "picture to write (default: %(default)s)"
    add("--out", type=Path, default=Path("equivision_show.png"), metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Draw the picture; returns the exit status."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from equivision_timm.cli.figures import check_figure_file, figure_bytes, plain_text

    check_figure_file(args.out)
    picture = open_rgb(args.image)
    models = [load(spec, args.size, args.num_classes, args.model_kwargs) for spec in dict.fromkeys(args.models)]
    scale = Normalize(0, _LEAST)  # of the differences: it grows with them
    width = (_COLUMN * len(args.angles) + 0.5) * len(models)  # inches
    with plain_text():
        figure = Figure(figsize=(width, _HEIGHT), layout="constrained")
        frames = figure.subfigures(1, len(models), squeeze=False, wspace=0.03)[0]
        for frame, loaded in zip(frames, models, strict=True):
            _draw_model(frame, loaded, preparation(loaded.config)(picture), args, scale)
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


@torch.inference_mode()
def _draw_model(
    frame: "SubFigure", loaded: Loaded, upright: torch.Tensor, args: argparse.Namespace, scale: "Normalize"
) -> None:
    """A column per angle for an image [C, H, W]: image, map, map rotated back, difference; below it the scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import LinearLocator, PercentFormatter

    model: Any = loaded.model
    maps = scalar_maps(model, upright[None], args.level)[0]  # [maps, h, w]
    chosen = int(maps.flatten(1).var(1, correction=0).argmax())
    reference = maps[chosen]
    low, high = reference.min().item(), reference.max().item()
    extent = max(high - low, torch.finfo(reference.dtype).tiny)  # a flat map has no range
    layer = model.feature_info[args.level]["module"] if hasattr(model, "feature_info") else f"level {args.level}"
    kind = "field" if getattr(model, "group", "c1") != "c1" else "channel"
    name = shortened(short_name(loaded.spec).partition("=")[0], 20 * len(args.angles))
    title = f"{name}, {upright.shape[1]} px\nfeature map: {layer}, {kind} {chosen + 1} of {len(maps)}"
    frame.suptitle(title, fontsize=14, fontweight="bold")
    titles = class_titles(loaded.class_names(args.class_map))
    grid = frame.add_gridspec(5, len(args.angles), height_ratios=(1, 1, 1, 1, 0.09))
    axes = [[frame.add_subplot(grid[row, place]) for place in range(len(args.angles))] for row in range(4)]
    for place, angle in enumerate(args.angles):
        image = rotate(upright[None], angle)  # [1, C, H, W]
        probability, best = model(image).softmax(1)[0].max(0)
        found = scalar_maps(model, image, args.level)[0, chosen]
        returned = rotate(found[None, None], -angle)[0, 0]
        difference = _masked((returned - reference).abs() / extent)
        scale.vmax = max(scale.vmax or 0, difference.max())
        top, middle, back, bottom = (row[place] for row in axes)
        top.imshow(_pixels(image[0], loaded.config), cmap="gray")
        top.set_title(f"{angle:g}°\n{titles[int(best)]}\n{probability:.0%}", fontsize=13)
        middle.imshow(found.numpy(), vmin=low, vmax=high)
        back.imshow(_masked(returned), vmin=low, vmax=high)
        bottom.imshow(difference, cmap="inferno", norm=scale)
        bottom.set_title(f"{map_error(returned, reference):.1%}", fontsize=13)
    for row, label in zip(axes, ("image", "feature map", "rotated back", "difference"), strict=True):
        row[0].set_ylabel(label, fontsize=13)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    place, colours = frame.add_subplot(grid[4, :]), ScalarMappable(scale, "inferno")
    style = {"orientation": "horizontal", "ticks": LinearLocator(5), "format": PercentFormatter(1)}
    bar = frame.colorbar(colours, cax=place, **style)
    bar.ax.tick_params(labelsize=12)
    bar.set_label("difference relative to the range of the map", fontsize=12)


def _masked(values: torch.Tensor) -> np.ma.MaskedArray:
    return np.ma.masked_array(values.numpy(), ~inscribed_circle(values, _PART).numpy())


def _pixels(image: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    """A normalised image [C, H, W] as matplotlib draws it, [H, W, C] or [H, W], in 0 ... 1."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
