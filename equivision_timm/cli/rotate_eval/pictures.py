"""Pictures of what rotate-eval measured: curves against the angle, and samples of the images as they were turned."""

import sys

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from equivision_timm.arguments import one_line, shortened
from equivision_timm.cli.loading import short_name
from equivision_timm.cli.rotate_eval.measure import Folder, in_circle
from equivision_timm.cli.rotate_eval.results import Cell, Results
from equivision_timm.images.pictures import PictureError
from equivision_timm.images.rotation import rotate

__all__ = ["CORNERS", "TITLES", "draw", "draw_samples", "draw_stages", "headline", "label"]

TITLES = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "agreement": "same class as unturned (%)",
    "drift": "relative change of the logits",
}
CORNERS = {
    "reflect": "corners filled by reflection",
    "circle": "only the inscribed circle shown",
}
# Okabe and Ito's, which the colour-blind tell apart; where curves coincide, the widths and markers show both
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vP*"
_LINES = ("-", "--", ":", "-.")
_ANGLE = "angle (degrees, counter-clockwise)"
_SAMPLE = 96  # pixels along a side
_SAMPLE_IMAGES, _SAMPLE_ANGLES = 3, 5  # at most


def draw(results: Results, metrics: list[str]) -> Figure:
    """A panel for each metric, with a title where there are several: all models against the angle; one legend below."""
    cells = results.measured()
    figure = Figure(figsize=(4.2 * len(metrics) + 0.3, 4.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for i, cell in enumerate(cells):
            angles, values = _curve(results.settings["angles"], cell.mean(metric))
            axes.plot(angles, values, **_style(i, len(cells)))
        _dress(axes, results.settings["angles"])
        axes.set_title(TITLES[metric] if len(metrics) > 1 else "", fontsize=12)
        axes.set_ylim(0, None if metric == "drift" else 102)
    labels = [label(cell, 60 if len(metrics) > 1 else 36) for cell in cells]
    fitting = int(40 * len(metrics) / (max(map(len, labels)) + 6))  # characters of a line, and those of an entry
    columns = max(1, min(len(cells), fitting, 4))
    lines = [Line2D([], [], **_style(i, len(cells))) for i in range(len(cells))]
    numbers = map(str, range(len(cells)))
    legend = figure.legend(lines, numbers, loc="outside lower center", ncols=columns, fontsize=11, handlelength=4)
    for text, words in zip(legend.get_texts(), labels, strict=True):
        text.set_text(words)  # afterwards: matplotlib leaves labels out that begin with '_'
    if len(metrics) > 1:
        figure.suptitle(shortened(headline(results), 120), fontsize=13)
    return figure


def draw_stages(results: Results, cells: list[Cell]) -> Figure:
    """A panel for each of the cells: the error of each stage against the angle, to one scale for all of `results`."""
    columns = min(len(cells), 3)
    figure = Figure(figsize=(0.3 + 4.2 * columns, 4.2 * -(-len(cells) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(cells) // columns), columns, squeeze=False).flatten()
    worst = max(max(cell.stage_errors(stage)) for cell in results.measured() for stage in cell.stages)
    for axes, cell in zip(panels, cells, strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(cell.stages)))
        for i, (stage, colour) in enumerate(zip(cell.stages, colours, strict=True)):
            angles, errors = _curve(results.settings["angles"], cell.stage_errors(stage))
            (line,) = axes.plot(angles, errors, **{**_style(i, len(cell.stages)), "color": colour})
            line.set_label(f"\u200b{one_line(stage)}")  # matplotlib leaves labels out that begin with '_'
        _dress(axes, results.settings["angles"])
        axes.set_title(label(cell, 42), fontsize=11)
        axes.set_ylim(0, 1.05 * worst or 1)
        axes.legend(fontsize=9)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("|f(g x) - g f(x)| / |g f(x)|", fontsize=11)
    return figure


def draw_samples(folder: Folder, angles: list[float], corners: str) -> Figure | None:
    """A few images of the folder, in rows, at a few of the angles, in columns; None where none can be read."""
    shown = [angles[i] for i in np.unique(np.linspace(0, len(angles), _SAMPLE_ANGLES, endpoint=False).astype(int))]
    pictures = _samples(folder)
    if not pictures:
        return None
    figure = Figure(figsize=(1.2 * len(shown), 1.2 * len(pictures) + 0.3), layout="constrained")
    panels = figure.subplots(len(pictures), len(shown), squeeze=False)
    for row, picture in zip(panels, pictures, strict=True):
        pixels = pil_to_tensor(ImageOps.fit(picture, (_SAMPLE, _SAMPLE)))[None] / 127.5 - 1  # [1, C, H, W]
        for axes, angle in zip(row, shown, strict=True):
            turned = rotate(pixels, angle)
            turned = in_circle(turned) if corners == "circle" else turned
            axes.imshow((turned[0].permute(1, 2, 0).squeeze(-1).clamp(-1, 1) / 2 + 0.5).numpy(), cmap="gray", vmin=0)
            axes.set_axis_off()
    for axes, angle in zip(panels[0], shown, strict=True):
        axes.set_title(f"{angle:g}°", fontsize=11)
    return figure


def _samples(folder: Folder) -> list[Image.Image]:
    """The first pictures that can be read, spread over the files, which are sorted by class."""
    found = []
    for index in torch.linspace(0, len(folder) - 1, min(len(folder), 4 * _SAMPLE_IMAGES)).long().tolist():
        try:
            found.append(folder.picture(index))
        except PictureError:  # noqa: PERF203  the others still show what is measured
            continue
    return found[:: max(1, -(-len(found) // _SAMPLE_IMAGES))]


def _style(index: int, count: int) -> dict:
    """How the curve of one of `count` cells looks: the later, the narrower, so that those below show at its sides."""
    kinds = len(_COLOURS)
    return {
        "color": _COLOURS[index % kinds],
        "marker": _MARKERS[index % kinds],
        "linestyle": _LINES[(index % kinds + index // kinds) % len(_LINES)],
        "linewidth": 3.5 - 2 * index / max(1, count - 1),
        "markersize": 7 - 3 * index / max(1, count - 1),
    }


def _dress(axes: Axes, angles: list[float]) -> None:
    """Ticks at familiar angles, which begin on the left, and a grid."""
    spread = np.ptp(angles)
    axes.xaxis.set_major_locator(MultipleLocator(90 if spread > 180 else 45 if spread > 90 else 15))
    axes.set_xlabel(_ANGLE, fontsize=11)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)


def _curve(angles: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Angles and values in order; where they go all the way round, the first point once more, 360 degrees on."""
    angles, values = map(list, zip(*sorted(zip(angles, values, strict=True)), strict=True))
    steps = np.diff(angles)
    if len(steps) and angles[0] + 360 - angles[-1] <= 1.001 * max(steps):
        return [*angles, angles[0] + 360], [*values, values[0]]
    return angles, values


def label(cell: Cell, most: int = sys.maxsize) -> str:
    """What a curve or a row is called; of more than `most` characters the model's name is cut."""
    words = f", {cell.size} px" + (f", mean of {cell.turns} rotations" if cell.turns > 1 else "")
    return shortened(short_name(cell.model), most - len(words)) + words


def headline(results: Results) -> str:
    """What was measured on."""
    settings = results.settings
    return f"Turned images of {one_line(settings['data'])} ({settings['files']} files, {CORNERS[settings['corners']]})"
