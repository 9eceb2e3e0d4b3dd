"""Writes what rotate-eval measured: tables, pictures, and one HTML page that needs no network and fits a telephone."""

import base64
import html
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from equivision_timm.arguments import one_line
from equivision_timm.cli.figures import figure_bytes, plain_text
from equivision_timm.cli.rotate_eval.pictures import TITLES, draw, draw_stages, headline, label
from equivision_timm.cli.rotate_eval.results import Results
from equivision_timm.files import write_file

__all__ = ["FILES", "STAGE_FILES", "write_report"]

FILES = ("results.csv", "rotation.png", "report.html")
STAGE_FILES = ("stages.csv", "stages.png")  # where stages were measured

_DPI = 110


def write_report(results: Results, folder: Path, samples: Figure | None = None) -> None:
    """Write `FILES`, and `STAGE_FILES` where stages were measured, into `folder`, each whole or not at all.

    Args:
        results: what was measured.
        folder: where to write.
        samples: picture of some of the images, for the page.
    """
    cells = results.measured()
    metrics = _drawn(results)
    contents = {"results.csv": results.csv()}
    with plain_text():
        contents["rotation.png"] = figure_bytes(draw(results, metrics), ".png", _DPI)
        if results.settings["by_stage"]:
            contents["stages.csv"] = results.stages_csv()
            contents["stages.png"] = figure_bytes(draw_stages(results, cells), ".png", _DPI)
        contents["report.html"] = _page(results, samples).encode(errors="backslashreplace")
    for name, content in contents.items():
        write_file(folder / name, content)


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
.names td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; } summary { cursor: pointer; }
@media (max-width: 40rem) { /* each row below the other, with the name of the column in front of each value */
  .names thead { display: none; } .names tr { display: block; padding: .5rem 0; border-bottom: 1px solid #ddd; }
  .names table, .names tbody { display: block; }
  .names td { display: flex; justify-content: space-between; padding: 0; border: 0; }
  .names td::before { content: attr(data-column); } .names td:first-child { font-weight: bold; }
  .names td:first-child::before { content: none; }
}
"""


def _drawn(results: Results) -> list[str]:
    """The metrics that have a picture."""
    return [metric for metric in results.measured()[0].metrics() if metric != "top5"]


def _page(results: Results, samples: Figure | None) -> str:
    """The page; `samples`: some of the images."""
    title, metrics = html.escape(headline(results)), _drawn(results)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{_notes(results)}
<h2>Summary</h2><div class="wide names">{_summary(results)}</div>
<h2>Against the angle</h2>
<div class="side">{"".join(_by_angle(results, metric) for metric in metrics)}</div>
<p class="note">Agreement: the predicted class is the one of the unturned image. Drift: |z - z0| / |z0|, z the logits
less their mean, z0 those of the unturned image. Multiples of 90 degrees move whole pixels, other angles resample.</p>
{_stages(results) if results.settings["by_stage"] else ""}
{f"<h2>Some of the images</h2>{_image(samples, 'Images at several angles')}" if samples else ""}
<h2>How it was measured</h2>{_origins(results)}</body></html>
"""


def _image(figure: Figure, words: str) -> str:
    """The figure as an element of the page."""
    picture = base64.b64encode(figure_bytes(figure, ".png", _DPI)).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{picture}">'


def _notes(results: Results) -> str:
    """A warning for every cell that does not hold all images."""
    lines = []
    for cell in results.measured():
        if cell.position < results.settings["files"]:
            lines.append(f"{label(cell)}: interrupted after {cell.position} of {results.settings['files']} files.")
        if cell.unreadable:
            names = ", ".join(map(one_line, cell.unreadable))
            lines.append(f"{label(cell)}: left out {len(cell.unreadable)} unreadable: {names}.")
    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def _summary(results: Results) -> str:
    cells = results.measured()
    main = cells[0].metrics()[0]
    rows = []
    for cell in cells:
        values, agreement, drift = cell.mean(main), cell.mean("agreement"), cell.mean("drift")
        angle = results.settings["angles"][int(np.argmin(values))]
        numbers = [f"{np.mean(values):.2f}", f"{min(values):.2f} (at {angle:g}°)"]
        if main == "top1":
            numbers.append(f"{np.mean(agreement):.2f}")
        rows.append([label(cell), str(cell.images), *numbers, f"{np.mean(drift):.3g}", f"{max(drift):.3g}"])
    name = "top-1" if main == "top1" else "agreement"
    head = ["model", "images", f"{name}, mean (%)", f"{name}, worst (%)"]
    if main == "top1":
        head.append("agreement, mean (%)")
    return _table([*head, "drift, mean", "drift, worst"], rows)


def _by_angle(results: Results, metric: str) -> str:
    """The curves of a metric and its table; with top-1 that of top-5."""
    title = TITLES[metric].capitalize()
    tables = [_angle_table(results, name) for name in ([metric, "top5"] if metric == "top1" else [metric])]
    picture = _image(draw(results, [metric]), f"{title} against the angle")
    return f"<section><h3>{title}</h3>{picture}{''.join(tables)}</section>"


def _angle_table(results: Results, metric: str) -> str:
    """A metric of all cells, a row for each angle, unfolded by a click."""
    digits = "{:.2g}" if metric == "drift" else "{:.1f}"
    columns = [[digits.format(value) for value in cell.mean(metric)] for cell in results.measured()]
    rows = [[f"{angle:g}°", *values] for angle, *values in zip(results.settings["angles"], *columns, strict=True)]
    table = _table(["angle", *(label(cell) for cell in results.measured())], rows)
    return f'<details><summary>Table: {TITLES[metric]}</summary><div class="wide">{table}</div></details>'


def _stages(results: Results) -> str:
    """The section on the maps of the stages."""
    rows, pictures = [], []
    for cell in results.measured():
        pictures.append(f"<section>{_image(draw_stages(results, [cell]), f'Errors by stage: {label(cell)}')}</section>")
        for stage in cell.stages:
            errors = cell.stage_errors(stage)
            worst = results.settings["angles"][int(np.argmax(errors))]
            rows.append([label(cell), one_line(stage), f"{np.mean(errors):.3f}", f"{max(errors):.3f} (at {worst:g}°)"])
    return f"""<h2>By stage</h2><div class="side">{"".join(pictures)}</div>
<div class="wide names">{_table(["model", "stage", "error, mean", "error, worst"], rows)}</div>
<p class="note">Error: |f(g x) - g f(x)| / |g f(x)| of the maps f of a stage, in a disc of 0.8 times the inscribed
radius, behind a smooth circular mask on the image; g the rotation. 0: the map turns with the image. 1: it has next to
nothing in common with the turned map.</p>
"""


def _origins(results: Results) -> str:
    """The commands, days, versions and weights that gave the figures."""
    origins: dict[tuple[str, str, str], list[list[str]]] = {}
    for cell in results.measured():
        weights = [f"weights (SHA-256) of {label(cell)}", cell.weights]
        origins.setdefault((cell.command or "none: called from Python", cell.date, cell.versions), []).append(weights)
    tables = []
    for origin, weights in origins.items():
        rows = [*zip(("command", "date", "versions"), map(one_line, origin), strict=True), *weights]
        tables.append(f'<div class="left">{_table([], list(map(list, rows)))}</div>')
    return "<br>".join(tables)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str]) -> str:
        """Each cell with its column, which a narrow page writes before it."""
        names = [f' data-column="{html.escape(name)}"' for name in head] or [""] * len(cells)
        pairs = zip(names, cells, strict=True)
        return "<tr>" + "".join(f"<td{name}>{html.escape(cell)}</td>" for name, cell in pairs) + "</tr>"

    top = f"<thead><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(map(row, rows))}</tbody></table>"
