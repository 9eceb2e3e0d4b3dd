"""The report of `rotate-eval`: tables and pictures."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MultipleLocator
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from equivision_timm.cli.figures import figure_bytes, plain_text
from equivision_timm.cli.models import Loaded, class_titles, short_name
from equivision_timm.cli.options import aligned, as_csv
from equivision_timm.cli.rotate_eval import METRICS, Predict, Result, Settings, shown
from equivision_timm.data import ImageFolder, PictureError
from equivision_timm.errors import one_line, shortened
from equivision_timm.files import write_file

__all__ = ["FILES", "Samples", "draw", "draw_stages", "write"]

FILES = ("results.csv", "rotation.png", "stages.png")  # the last one if measured

_DPI = 110
_TITLES = {  # of the metrics that are drawn
    "top1": "top-1 accuracy (%)",
    "agreement": "same class as unrotated (%)",
    "drift": "relative change of the logits",
}
_CORNERS = {"reflect": "corners filled by reflection", "circle": "only the inscribed circle shown"}
# Okabe and Ito's colours, which the colour-blind can distinguish; widths and markers separate curves that coincide
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vP*"
_LINES = ("-", "--", ":", "-.")
_LEAST_DRIFT = 0.1  # the axis ends there at least: rounding errors stay at its floor
_SAMPLE, _SAMPLE_SIDE = 96, 1.25  # pixels and inches along a side
_SAMPLE_ANGLES, _SAMPLE_MODELS = 8, 6  # at most


class Samples:
    """A few readable images of a folder, and the classes that models predict for them at a few of the angles."""

    def __init__(self, folder: ImageFolder, angles: list[float]) -> None:
        self.angles: list[float] = angles[:: -(-len(angles) // _SAMPLE_ANGLES)]
        self.pictures: list[Image.Image] = []
        self.targets: list[int] = []
        self.titles: list[str] = []  # of their classes; [] without labels
        # For the model, size and turns of a result: a class title for each angle and picture
        self.predictions: dict[tuple[str, int, int], list[list[str]]] = {}
        for index in sorted({len(folder) * part // 8 for part in (1, 5)}):
            with contextlib.suppress(PictureError):
                self.pictures.append(folder.picture(index))
                self.targets.append(folder.samples[index][1])

    @torch.inference_mode()
    def classify(
        self, settings: Settings, predict: Predict, loaded: Loaded, folder: ImageFolder, device: torch.device
    ) -> None:
        """Add the predictions of a model, which lies on `device`, for images as `folder` prepares them."""
        if not self.pictures:
            return
        names = loaded.class_names()
        if settings.labelled and names == [str(index) for index in range(len(names))]:  # unknown: the sub-folders'
            own = {index: name for name, index in folder.class_to_idx.items()}
            names = [own.get(index, "") for index in range(len(names))]
        titles = class_titles(names)
        images = torch.stack([folder.transform(picture) for picture in self.pictures]).to(device)  # type: ignore[misc]
        indices = [predict(shown(images, angle, settings.corners)).argmax(1).tolist() for angle in self.angles]
        self.titles = [titles[target] for target in self.targets] if settings.labelled else []
        self.predictions[settings.cell] = [[titles[index] for index in row] for row in indices]


def write(results: list[Result], folder: Path, samples: Samples | None = None) -> str:
    """Write `FILES` into `folder`, of results that agree in their images and angles; returns a table to print."""
    rows = []
    for result in results:
        model, size, turns = result.settings.cell
        means = {name: [f"{value:.6g}" for value in result.mean(name)] for name in result.sums}
        for i, angle in enumerate(result.settings.angles):
            row = {"model": model, "size": size, "turns": turns, "angle": f"{angle:g}", "images": result.images}
            rows.append({**row, **{name: values[i] for name, values in means.items()}})
    write_file(folder / "results.csv", as_csv(rows).encode(errors="backslashreplace"))
    with plain_text():
        write_file(folder / "rotation.png", figure_bytes(draw(results, samples), ".png", _DPI))
        if results[0].settings.by_stage:
            write_file(folder / "stages.png", figure_bytes(draw_stages(results), ".png", _DPI))
    return f"{_headline(results)}\n{_summary(results)}\nAll angles: {one_line(str(folder / 'results.csv'))}"


def _summary(results: list[Result]) -> str:
    """Mean and worst value of every metric that is drawn, over the angles."""
    metrics = [name for name in _TITLES if name in results[0].sums]
    rows = [["model", "images", *(f"{metric}, {what}" for metric in metrics for what in ("mean", "worst"))]]
    for result in results:
        row = [_label(result), str(result.images)]
        for metric in metrics:
            values, digits = result.mean(metric), ".3g" if metric == "drift" else ".2f"
            worst = int(np.argmax(values) if metric == "drift" else np.argmin(values))
            row += [f"{np.mean(values):{digits}}", f"{values[worst]:{digits}} at {result.settings.angles[worst]:g}°"]
        rows.append(row)
    return aligned(rows)


def _stages(result: Result) -> list[str]:
    """The stages measured, from the stem on."""
    return [name for name in result.sums if name not in METRICS]


# Pictures


def draw(results: list[Result], samples: Samples | None = None) -> Figure:
    """All models against the angle, a panel for each metric; one legend; below it some images with predictions."""
    metrics, settings = [name for name in _TITLES if name in results[0].sums], results[0].settings
    styles = {result.settings.cell: _style(i, len(results)) for i, result in enumerate(results)}
    predicted = [cell for cell in styles if samples and cell in samples.predictions][:_SAMPLE_MODELS]
    heights = [4.2 + 0.25 * (len(results) // 4)]
    if samples and predicted:
        heights.append(0.6 + (_SAMPLE_SIDE + 0.2 * len(predicted)) * len(samples.pictures))
    figure = Figure(figsize=(4.2 * max(2, len(metrics)) + 0.3, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = parts[0].subplots(1, len(metrics), squeeze=False)[0]
    labels = [f"\u200b{_label(result, 60)}" for result in results]  # matplotlib omits labels that begin with '_'
    for axes, metric in zip(panels, metrics, strict=True):
        means = [result.mean(metric) for result in results]
        for values, label, style in zip(means, labels, styles.values(), strict=True):
            axes.plot(*_curve(settings.angles, values), label=label, **style)
        _dress(axes, settings.angles)
        axes.set_title(_TITLES[metric], fontsize=12)
        axes.set_ylim(0, max(_LEAST_DRIFT, 1.05 * max(map(max, means))) if metric == "drift" else 102)
        if metric == "top1":
            chance = 100 / settings.classes
            axes.axhline(chance, color="0.4", linestyle=(0, (1, 2)))
            axes.annotate("chance", (1, chance), (-4, 2), ("axes fraction", "data"), "offset points", ha="right")
    columns = max(1, min(len(results), int(40 * len(metrics) / (max(map(len, labels)) + 6)), 4))
    handles = panels[0].get_legend_handles_labels()
    parts[0].legend(*handles, loc="outside lower center", ncols=columns, fontsize=11, handlelength=4)
    parts[0].suptitle(shortened(_headline(results), 120), fontsize=13)
    if samples and predicted:
        _draw_samples(parts[1], samples, settings.corners, {cell: styles[cell]["color"] for cell in predicted})
    return figure


def _draw_samples(part: SubFigure, samples: Samples, corners: str, colours: dict[tuple[str, int, int], str]) -> None:
    """A row per image, a column per angle; below each image a line per model: filled if correct, hollow if wrong."""
    panels = part.subplots(len(samples.pictures), len(samples.angles), squeeze=False)
    for number, (row, picture) in enumerate(zip(panels, samples.pictures, strict=True)):
        square = ImageOps.fit(picture.convert("RGB"), (_SAMPLE, _SAMPLE))
        pixels = pil_to_tensor(square)[None] / 127.5 - 1  # [1, 3, H, W]
        for column, (axes, angle) in enumerate(zip(row, samples.angles, strict=True)):
            image = shown(pixels, angle, corners)[0].permute(1, 2, 0)  # [H, W, 3]
            axes.imshow((image.clamp(-1, 1) / 2 + 0.5).numpy())
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if number == 0:
                axes.set_title(f"{angle:g}°", fontsize=11)
            for line, (cell, colour) in enumerate(colours.items()):
                title = samples.predictions[cell][column][number]
                correct = bool(samples.titles) and title == samples.titles[number]
                edge, fill = colour if samples.titles else "white", colour if correct else "white"
                box = {"boxstyle": "round,pad=0.2", "facecolor": fill, "edgecolor": edge}
                style = {"fontsize": 8, "color": "white" if correct else colour, "bbox": box}
                place = (0.5, 0), (0, -11 - 14.4 * line), "axes fraction", "offset points"
                axes.annotate(title, *place, ha="center", va="center", **style)
        if samples.titles:
            row[0].set_ylabel(f"true: {samples.titles[number]}", fontsize=10)
    note = "Predictions, coloured as the curves" + (": filled if correct, hollow if wrong" if samples.titles else "")
    part.suptitle(note, fontsize=11)
    part.supxlabel(" ", fontsize=6)  # distance from the lower edge


def draw_stages(results: list[Result]) -> Figure:
    """The error of each stage against the angle, a panel for each result, with the same scale."""
    columns, rows = min(len(results), 3), -(-len(results) // 3)
    figure = Figure(figsize=(0.3 + 4.2 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    worst = max(max(result.mean(stage)) for result in results for stage in _stages(result))
    for axes, result in zip(panels, results, strict=False):
        stages = _stages(result)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(stages)))
        for i, (stage, colour) in enumerate(zip(stages, colours, strict=True)):
            style = {**_style(i, len(stages)), "color": colour}
            axes.plot(*_curve(result.settings.angles, result.mean(stage)), label=one_line(stage), **style)
        _dress(axes, result.settings.angles)
        axes.set_title(_label(result, 42), fontsize=11)
        axes.set_ylim(0, 1.05 * worst or 1)
        axes.legend(fontsize=9)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("|f(g x) - g f(x)| / |g f(x)|", fontsize=11)
    return figure


def _style(index: int, count: int) -> dict[str, Any]:
    """The style of one of `count` curves; later ones are narrower, so that those below remain visible at the sides."""
    kinds = len(_COLOURS)
    return {
        "color": _COLOURS[index % kinds],
        "marker": _MARKERS[index % kinds],
        "linestyle": _LINES[(index % kinds + index // kinds) % len(_LINES)],
        "linewidth": 3.5 - 2 * index / max(1, count - 1),
        "markersize": 7 - 3 * index / max(1, count - 1),
    }


def _dress(axes: Axes, angles: list[float]) -> None:
    """Ticks at familiar angles, and a grid."""
    spread = np.ptp(angles)
    axes.xaxis.set_major_locator(MultipleLocator(90 if spread > 180 else 45 if spread > 90 else 15))
    axes.set_xlabel("angle (degrees, counter-clockwise)", fontsize=11)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)


def _curve(angles: list[float], values: list[float]) -> np.ndarray:
    """Angles and values in order, [2, A]; of a full circle the first point is repeated 360 degrees further."""
    points = np.array(sorted(zip(angles, values, strict=True))).T  # [2, A]
    steps = np.diff(points[0])
    goes_round = len(steps) and points[0, 0] + 360 - points[0, -1] <= 1.001 * max(steps)
    return np.column_stack([points, points[:, 0] + [360, 0]]) if goes_round else points


def _label(result: Result, most: int = sys.maxsize) -> str:
    """Label of a curve or a row, at most so many characters: the model's name is cut."""
    settings = result.settings
    words = f", {settings.size} px" + (f", mean of {settings.turns} rotations" if settings.turns > 1 else "")
    words += f", {result.position} of {settings.files} files" if result.position < settings.files else ""
    return shortened(short_name(settings.model), most - len(words)) + words


def _headline(results: list[Result]) -> str:
    settings = results[0].settings
    return f"Rotated images of {one_line(settings.data)} ({settings.files} files, {_CORNERS[settings.corners]})"
