"""Shows what rotate-eval measured: one picture, one table, one HTML page that needs no network."""

import base64
import html
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from equivision_timm.arguments import one_line, shortened
from equivision_timm.files import write_file
from equivision_timm.tools.figures import figure_bytes, plain_text
from equivision_timm.tools.loading import short_name
from equivision_timm.tools.rotate_eval.results import Cell, Results

__all__ = ["FILES", "STAGE_FILES", "write_report"]

FILES = ("results.csv", "rotation.png", "report.html")
STAGE_FILES = ("stages.csv", "stages.png")  # where stages were measured

_TITLES = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "agreement": "same class as unturned (%)",
    "drift": "relative change of the logits",
}
_CORNERS = {
    "reflect": "corners filled by reflection",
    "circle": "only the inscribed circle shown",
}


def write_report(results: Results, folder: Path) -> None:
    """Write `FILES`, and `STAGE_FILES` where stages were measured, into `folder`, each whole or not at all."""
    contents = {}
    pictures = [("Accuracy, agreement and drift against the angle", "rotation.png", draw)]
    if results.settings["by_stage"]:
        pictures.append(("Error of each stage against the angle", "stages.png", draw_stages))
        contents["stages.csv"] = results.stages_csv()
    with plain_text():
        contents |= {name: figure_bytes(drawn(results), ".png", dpi=110) for _, name, drawn in pictures}
    page = _page(results, {title: contents[name] for title, name, _ in pictures})
    contents |= {"results.csv": results.csv(), "report.html": page.encode(errors="backslashreplace")}
    for name, content in contents.items():
        write_file(folder / name, content)


def draw(results: Results) -> Figure:
    """Accuracy against the angle, polar and Cartesian, and below it agreement and drift."""
    cells = results.measured()
    main = "top1" if "top1" in cells[0].sums else "agreement"
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    polar = figure.add_subplot(grid[0, 0], projection="polar")
    plain, agreement, drift = (figure.add_subplot(grid[place]) for place in ((0, 1), (1, 0), (1, 1)))
    colours = [matplotlib.colormaps["tab10"](i) for i in range(10)]

    lines = []
    for i, cell in enumerate(cells):
        style = {"color": colours[i % 10], "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        style["linestyle"] = ("-", "--", "-.", ":")[i // 10 % 4]
        for axes, metric in ((polar, main), (plain, main), (agreement, "agreement"), (drift, "drift")):
            angles, values = _curve(results.settings["angles"], cell.mean(metric))
            lines += axes.plot(np.deg2rad(angles) if axes is polar else angles, values, **style)

    wide = np.ptp(results.settings["angles"]) > 180
    polar.set_ylim(0, 100)
    polar.set(rlabel_position=22.5)
    polar.set_title(_TITLES[main])
    for axes, metric in ((plain, main), (agreement, "agreement"), (drift, "drift")):
        axes.set_xlabel("angle (degrees, counter-clockwise)")
        axes.set_ylabel(_TITLES[metric])
        axes.xaxis.set_major_locator(MultipleLocator(45 if wide else 15))
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    plain.set_ylim(0, 102)
    agreement.set_ylim(0, 102)
    labels = [shortened(_label(cell), 60) for cell in cells]
    columns = min(len(cells), max(1, 160 // max(map(len, labels))), 4)
    legend = figure.legend(lines[::4], map(str, range(len(cells))), loc="outside lower center", ncols=columns)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)  # afterwards: matplotlib leaves labels out that begin with '_'
    figure.suptitle(shortened(_headline(results), 120))
    return figure


def draw_stages(results: Results) -> Figure:
    """A panel for each model: the error of each stage against the angle."""
    cells = results.measured()
    columns = min(len(cells), 3)
    figure = Figure(figsize=(1 + 4.5 * columns, 4.2 * -(-len(cells) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(cells) // columns), columns, squeeze=False, sharey=True).flatten()
    wide = np.ptp(results.settings["angles"]) > 180
    for axes, cell in zip(panels, cells, strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, len(cell.stages)))
        for stage, colour in zip(cell.stages, colours, strict=True):
            angles, errors = _curve(results.settings["angles"], cell.stage_errors(stage))
            (line,) = axes.plot(angles, errors, "o-", color=colour, markersize=3, linewidth=1.6)
            line.set_label(f"\u200b{one_line(stage)}")  # matplotlib leaves labels out that begin with '_'
        axes.set_title(shortened(_label(cell), 44), fontsize=10)
        axes.set_xlabel("angle (degrees, counter-clockwise)")
        axes.xaxis.set_major_locator(MultipleLocator(90 if wide else 15))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("|f(g x) - g f(x)| / |g f(x)|")
    figure.suptitle("How far the maps of each stage turn with the image: 0 is perfect")
    return figure


def _curve(angles: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Angles and values in order; where they go all the way round, the first point once more, 360 degrees on."""
    angles, values = map(list, zip(*sorted(zip(angles, values, strict=True)), strict=True))
    steps = np.diff(angles)
    if len(steps) and angles[0] + 360 - angles[-1] <= 1.001 * max(steps):
        return [*angles, angles[0] + 360], [*values, values[0]]
    return angles, values


def _label(cell: Cell) -> str:
    averaged = f", mean of {cell.turns} rotations" if cell.turns > 1 else ""
    return f"{one_line(short_name(cell.model))}, {cell.size} px{averaged}"


def _headline(results: Results) -> str:
    settings = results.settings
    return f"Turned images of {one_line(settings['data'])} ({settings['files']} files, {_CORNERS[settings['corners']]})"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; } .side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.side table { font-size: .8rem; } .side th, .side td { padding: .1rem .45rem; } .note { color: #666; }
"""


def _page(results: Results, pictures: dict[str, bytes]) -> str:
    """The page with `pictures`, by what they show."""
    title = html.escape(_headline(results))
    shown = [
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    ]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{_notes(results)}
<h2>Summary</h2><div class="wide">{_summary(results)}</div>
<h2>Against the angle</h2>{shown[0]}
<div class="side">{"".join(_by_angle(results, metric) for metric in results.measured()[0].metrics())}</div>
<p class="note">Agreement: the predicted class is the one of the unturned image. Drift: |z - z0| / |z0|, z the logits
less their mean, z0 those of the unturned image. Multiples of 90 degrees move whole pixels, other angles resample.</p>
{_stages(results, *shown[1:]) if results.settings["by_stage"] else ""}</body></html>
"""


def _notes(results: Results) -> str:
    """A warning for every cell that does not hold all images."""
    lines = []
    for cell in results.measured():
        if cell.position < results.settings["files"]:
            lines.append(f"{_label(cell)}: interrupted after {cell.position} of {results.settings['files']} files.")
        if cell.unreadable:
            names = ", ".join(map(one_line, cell.unreadable))
            lines.append(f"{_label(cell)}: left out {len(cell.unreadable)} unreadable: {names}.")
    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def _summary(results: Results) -> str:
    cells = results.measured()
    main = "top1" if "top1" in cells[0].sums else "agreement"
    rows = []
    for cell in cells:
        values, agreement, drift = cell.mean(main), cell.mean("agreement"), cell.mean("drift")
        angle = results.settings["angles"][int(np.argmin(values))]
        numbers = [f"{np.mean(values):.2f}", f"{min(values):.2f} (at {angle:g}°)"]
        if main == "top1":
            numbers.append(f"{np.mean(agreement):.2f}")
        rows.append([_label(cell), str(cell.images), *numbers, f"{np.mean(drift):.3g}", f"{max(drift):.3g}"])
    name = "top-1" if main == "top1" else "agreement"
    head = ["model", "images", f"{name}, mean (%)", f"{name}, worst (%)"]
    if main == "top1":
        head.append("agreement, mean (%)")
    return _table([*head, "drift, mean", "drift, worst"], rows)


def _stages(results: Results, picture: str) -> str:
    """The section on the maps of the stages."""
    rows = []
    for cell in results.measured():
        for stage in cell.stages:
            errors = cell.stage_errors(stage)
            worst = results.settings["angles"][int(np.argmax(errors))]
            rows.append([_label(cell), one_line(stage), f"{np.mean(errors):.3f}", f"{max(errors):.3f} (at {worst:g}°)"])
    return f"""<h2>By stage</h2>{picture}
<div class="wide">{_table(["model", "stage", "error, mean", "error, worst"], rows)}</div>
<p class="note">Error: |f(g x) - g f(x)| / |g f(x)| of the maps f of a stage, in a disc of 0.8 times the inscribed
radius, behind a smooth circular mask on the image; g the rotation. 0: the map turns with the image. 1: it has next to
nothing in common with the turned map.</p>
"""


def _by_angle(results: Results, metric: str) -> str:
    digits = "{:.2g}" if metric == "drift" else "{:.1f}"
    columns = [[digits.format(value) for value in cell.mean(metric)] for cell in results.measured()]
    rows = [[f"{angle:g}°", *values] for angle, *values in zip(results.settings["angles"], *columns, strict=True)]
    head = ["angle", *(_label(cell) for cell in results.measured())]
    return f'<div class="wide"><h2>{_TITLES[metric].capitalize()}</h2>{_table(head, rows)}</div>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        f"<table><thead>{row(head, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"
    )
