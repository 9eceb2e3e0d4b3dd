"""The report of `rotate-eval`: tables, pictures, and one HTML page that loads nothing from elsewhere."""

import base64
import csv
import html
import io
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from PIL import ImageOps
from torchvision.transforms.functional import pil_to_tensor

from equivision_timm.cli.figures import figure_bytes, plain_text
from equivision_timm.cli.models import short_name
from equivision_timm.cli.rotate_eval import in_circle
from equivision_timm.cli.rotate_results import Result
from equivision_timm.data import ImageFolder, PictureError
from equivision_timm.errors import one_line, shortened
from equivision_timm.files import write_file
from equivision_timm.rotation import rotate

__all__ = ["FILES", "STAGE_FILES", "draw", "draw_samples", "draw_stages", "write"]

FILES = ("results.csv", "rotation.png", "report.html")
STAGE_FILES = ("stages.csv", "stages.png")  # if stages were measured

_DPI = 110
_TITLES = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "agreement": "same class as unrotated (%)",
    "drift": "relative change of the logits",
}
_CORNERS = {"reflect": "corners filled by reflection", "circle": "only the inscribed circle shown"}
# Okabe and Ito's colours, which the colour-blind can distinguish; widths and markers separate curves that coincide
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vP*"
_LINES = ("-", "--", ":", "-.")
_SAMPLE = 96  # pixels along a side
_SAMPLE_IMAGES, _SAMPLE_ANGLES = 3, 5  # at most


def write(results: list[Result], folder: Path, samples: Figure | None = None) -> None:
    """Write `FILES`, and `STAGE_FILES` if stages were measured, into `folder`.

    Args:
        results: under settings that may stand side by side, at least one image each.
        folder: where to write.
        samples: picture of some of the images, for the page.
    """
    contents = {"results.csv": _csv(results)}
    with plain_text():
        contents["rotation.png"] = figure_bytes(draw(results, _drawn(results)), ".png", _DPI)
        if results[0].stages:
            contents["stages.csv"] = _stages_csv(results)
            contents["stages.png"] = figure_bytes(draw_stages(results), ".png", _DPI)
        contents["report.html"] = _page(results, samples).encode(errors="backslashreplace")
    for name, content in contents.items():
        write_file(folder / name, content)


def _csv(results: list[Result]) -> bytes:
    """A row per model, size, number of turns and angle: per cent except for the drift."""
    metrics = results[0].metrics()
    rows: list[list[Any]] = [["model", "size", "turns", "angle", "images", *metrics]]
    for result in results:
        settings, means = result.settings, [result.mean(metric) for metric in metrics]
        for angle, *values in zip(settings.angles, *means, strict=True):
            figures = [settings.size, settings.turns, f"{angle:g}", result.images, *(f"{v:.6g}" for v in values)]
            rows.append([settings.model, *figures])
    return _csv_bytes(rows)


def _stages_csv(results: list[Result]) -> bytes:
    """A row per model, size, stage and angle."""
    rows: list[list[Any]] = [["model", "size", "stage", "angle", "images", "error"]]
    for result in results:
        model, size = result.settings.model, result.settings.size
        for stage in result.stages:
            for angle, error in zip(result.settings.angles, result.stage_errors(stage), strict=True):
                rows.append([model, size, stage, f"{angle:g}", result.images, f"{error:.6g}"])
    return _csv_bytes(rows)


def _csv_bytes(rows: list[list[Any]]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode(errors="backslashreplace")


# Pictures


def draw(results: list[Result], metrics: list[str]) -> Figure:
    """All models against the angle, a panel for each metric, with a title if there are several; one legend below."""
    angles = results[0].settings.angles
    figure = Figure(figsize=(4.2 * len(metrics) + 0.3, 4.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for i, result in enumerate(results):
            axes.plot(*_curve(angles, result.mean(metric)), **_style(i, len(results)))
        _dress(axes, angles)
        axes.set_title(_TITLES[metric] if len(metrics) > 1 else "", fontsize=12)
        axes.set_ylim(0, None if metric == "drift" else 102)
    labels = [_label(result, 60 if len(metrics) > 1 else 36) for result in results]
    fitting = int(40 * len(metrics) / (max(map(len, labels)) + 6))  # characters of a line, and those of an entry
    lines = [Line2D([], [], **_style(i, len(results))) for i in range(len(results))]
    columns = max(1, min(len(results), fitting, 4))
    numbers = list(map(str, range(len(results))))
    legend = figure.legend(lines, numbers, loc="outside lower center", ncols=columns, fontsize=11, handlelength=4)
    for text, words in zip(legend.get_texts(), labels, strict=True):
        text.set_text(words)  # afterwards: matplotlib omits labels that begin with '_'
    if len(metrics) > 1:
        figure.suptitle(shortened(_headline(results), 120), fontsize=13)
    return figure


def draw_stages(results: list[Result], worst: float | None = None) -> Figure:
    """The error of each stage against the angle, a panel for each result; up to `worst`, or the largest error."""
    columns = min(len(results), 3)
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(0.3 + 4.2 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    worst = _worst(results) if worst is None else worst
    for axes, result in zip(panels, results, strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(result.stages)))
        for i, (stage, colour) in enumerate(zip(result.stages, colours, strict=True)):
            angles, errors = _curve(result.settings.angles, result.stage_errors(stage))
            (line,) = axes.plot(angles, errors, **{**_style(i, len(result.stages)), "color": colour})
            line.set_label(f"\u200b{one_line(stage)}")  # matplotlib omits labels that begin with '_'
        _dress(axes, result.settings.angles)
        axes.set_title(_label(result, 42), fontsize=11)
        axes.set_ylim(0, 1.05 * worst or 1)
        axes.legend(fontsize=9)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("|f(g x) - g f(x)| / |g f(x)|", fontsize=11)
    return figure


def _worst(results: list[Result]) -> float:
    return max(max(result.stage_errors(stage)) for result in results for stage in result.stages)


def draw_samples(folder: ImageFolder, angles: list[float], corners: str) -> Figure | None:
    """A few images of the folder, in rows, at a few of the angles, in columns; None if none can be read."""
    shown = [angles[i] for i in np.unique(np.linspace(0, len(angles), _SAMPLE_ANGLES, endpoint=False).astype(int))]
    pictures = []
    for index in np.linspace(0, len(folder) - 1, min(len(folder), 4 * _SAMPLE_IMAGES)).astype(int).tolist():
        try:
            pictures.append(folder.picture(index))
        except PictureError:  # noqa: PERF203
            continue
    pictures = pictures[:: max(1, -(-len(pictures) // _SAMPLE_IMAGES))]
    if not pictures:
        return None
    figure = Figure(figsize=(1.2 * len(shown), 1.2 * len(pictures) + 0.3), layout="constrained")
    panels = figure.subplots(len(pictures), len(shown), squeeze=False)
    for row, picture in zip(panels, pictures, strict=True):
        pixels = pil_to_tensor(ImageOps.fit(picture, (_SAMPLE, _SAMPLE)))[None] / 127.5 - 1  # [1, 3, H, W]
        for axes, angle in zip(row, shown, strict=True):
            image = in_circle(rotate(pixels, angle)) if corners == "circle" else rotate(pixels, angle)
            axes.imshow((image[0].permute(1, 2, 0).clamp(-1, 1) / 2 + 0.5).numpy())
            axes.set_axis_off()
    for axes, angle in zip(panels[0], shown, strict=True):
        axes.set_title(f"{angle:g}°", fontsize=11)
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


def _curve(angles: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Angles and values in order; if they cover the full circle, the first point is repeated 360 degrees further."""
    angles, values = map(list, zip(*sorted(zip(angles, values, strict=True)), strict=True))
    steps = np.diff(angles)
    if len(steps) and angles[0] + 360 - angles[-1] <= 1.001 * max(steps):
        return [*angles, angles[0] + 360], [*values, values[0]]
    return angles, values


def _label(result: Result, most: int = sys.maxsize) -> str:
    """Label of a curve or a row, at most so many characters: the model's name is cut."""
    settings = result.settings
    words = f", {settings.size} px" + (f", mean of {settings.turns} rotations" if settings.turns > 1 else "")
    return shortened(short_name(settings.model), most - len(words)) + words


def _headline(results: list[Result]) -> str:
    settings = results[0].settings
    return f"Rotated images of {one_line(settings.data)} ({settings.files} files, {_CORNERS[settings.corners]})"


# The page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
img { max-width: 100%; height: auto; } p, .left td { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; } thead th { border-bottom: 2px solid #888; }
.left td { text-align: left; white-space: normal; } .wide { overflow-x: auto; } .note { color: #555; font-size: .9rem; }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .side > section { flex: 1 1 20rem; max-width: 36rem; }
.names td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
"""


def _drawn(results: list[Result]) -> list[str]:
    """The metrics that have a picture."""
    return [metric for metric in results[0].metrics() if metric != "top5"]


def _page(results: list[Result], samples: Figure | None) -> str:
    """The page; `samples`: some of the images."""
    title = html.escape(_headline(results))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{_notes(results)}
<h2>Summary</h2><div class="wide names">{_summary(results)}</div>
<h2>Against the angle</h2>
<div class="side">{"".join(_by_angle(results, metric) for metric in _drawn(results))}</div>
<p class="note">Agreement: the predicted class is that of the unrotated image. Drift: |z - z0| / |z0|, z the logits
minus their mean, z0 those of the unrotated image. Multiples of 90 degrees permute pixels, other angles resample.</p>
{_stages(results) if results[0].stages else ""}
{f"<h2>Some of the images</h2>{_image(samples, 'Images at several angles')}" if samples else ""}
<h2>How it was measured</h2>{_origins(results)}</body></html>
"""


def _image(figure: Figure, words: str) -> str:
    """The figure as an element of the page."""
    picture = base64.b64encode(figure_bytes(figure, ".png", _DPI)).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{picture}">'


def _notes(results: list[Result]) -> str:
    """A warning for every result that lacks images."""
    lines = []
    for result in results:
        if result.position < result.settings.files:
            lines.append(f"{_label(result)}: interrupted after {result.position} of {result.settings.files} files.")
        if result.unreadable:
            names = ", ".join(map(one_line, result.unreadable))
            lines.append(f"{_label(result)}: left out {len(result.unreadable)} unreadable: {names}.")
    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def _summary(results: list[Result]) -> str:
    """Mean and worst value of every metric that has a picture."""
    head, rows = ["model", "images"], []
    for metric in _drawn(results):
        head += [f"{metric}, mean", f"{metric}, worst"]
    for result in results:
        rows.append([_label(result), str(result.images)])
        for metric in _drawn(results):
            values, digits = result.mean(metric), ".3g" if metric == "drift" else ".2f"
            worst = int(np.argmax(values) if metric == "drift" else np.argmin(values))
            angle = f"{result.settings.angles[worst]:g}°"
            rows[-1] += [f"{np.mean(values):{digits}}", f"{values[worst]:{digits}} (at {angle})"]
    return _table(head, rows)


def _by_angle(results: list[Result], metric: str) -> str:
    """The curves of a metric."""
    title = _TITLES[metric].capitalize()
    picture = _image(draw(results, [metric]), f"{title} against the angle")
    return f"<section><h3>{title}</h3>{picture}</section>"


def _stages(results: list[Result]) -> str:
    """The section on the maps of the stages."""
    rows, pictures, largest = [], [], _worst(results)
    for result in results:
        picture = _image(draw_stages([result], largest), f"Errors by stage: {_label(result)}")
        pictures.append(f"<section>{picture}</section>")
        for stage in result.stages:
            errors = result.stage_errors(stage)
            worst = result.settings.angles[int(np.argmax(errors))]
            figures = [f"{np.mean(errors):.3f}", f"{max(errors):.3f} (at {worst:g}°)"]
            rows.append([_label(result), one_line(stage), *figures])
    return f"""<h2>By stage</h2><div class="side">{"".join(pictures)}</div>
<div class="wide names">{_table(["model", "stage", "error, mean", "error, worst"], rows)}</div>
<p class="note">Error: |f(g x) - g f(x)| / |g f(x)| of the maps f of a stage, in a disc of 0.8 times the inscribed
radius, with a smooth circular mask on the image; g the rotation. 0: the map rotates with the image. 1: it has next to
nothing in common with the rotated map.</p>
"""


def _origins(results: list[Result]) -> str:
    """The commands, days, versions and weights of the figures."""
    tables = []
    for origin in dict.fromkeys((result.command, result.date, result.versions) for result in results):
        rows = [list(row) for row in zip(("command", "date", "versions"), map(one_line, origin), strict=True)]
        measured = [result for result in results if (result.command, result.date, result.versions) == origin]
        rows += [[f"weights (SHA-256) of {_label(result)}", result.settings.weights] for result in measured]
        tables.append(f'<div class="left">{_table([], rows)}</div>')
    return "<br>".join(tables)


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{top}<tbody>{''.join(f'<tr>{cells}</tr>' for cells in body)}</tbody></table>"
