"""Real images in any orientation: networks from scratch and a pretrained one, plain and equivariant.

    pip install '.[real]'
    python scripts/real_data.py              # one seed, solar cells, from scratch at 97 pixels: 20 minutes of one core
    python scripts/real_data.py --full       # all rows, seeds and splits: hours
    python scripts/real_data.py --set deep-sky --full --folder FOLDER   # nebulae/default of Debian's stellarium-data
    python scripts/real_data.py --table      # train nothing, write the table and the picture again

The sets: solar_cells.py, with a published recipe and figures, and deep_sky.py. Every row sees the same images in the
same order for a seed. A test image is seen in all eight orientations of the square (quarter turns and reflections), one
at a time, and averaged over them. Results are added to scripts/benchmarks/real.json after each run; the same call goes
on where it was interrupted.

On Linux training takes .6 of the time where glibc keeps the memory that it is given back:
`MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python scripts/real_data.py`.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import deep_sky
import solar_cells
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from real_training import ALL, Data, Task, run

import equivision_timm

RESULTS = Path(__file__).parent / "benchmarks" / "real.json"
TASKS = {"solar-cells": solar_cells.TASK, "deep-sky": deep_sky.TASK}
Runs = dict[str, dict[str, dict[str, Any]]]  # by row, then by split and seed


def table(results: dict[str, Any]) -> str:
    """As Markdown: mean over the seeds, and the least and the largest."""
    lines = [
        "# Real data",
        "",
        "Written by `scripts/real_data.py`. Figures of test images in per cent, mean of the seeds (least to largest). "
        "Upright: as photographed; moved: the mean over the seven other orientations of the square. Training in CPU "
        "minutes of one thread, on more than one machine.",
    ]
    for name, task in TASKS.items():
        if name in results:
            runs = results[name]["runs"]
            lines += ["", f"## {task.title}", "", f"{task.text} {results[name]['about']}."]
            for split in task.splits:
                lines += split_table(task, runs, split)
            exact = [run["drift"] for row in runs if row.startswith(("D4", "lite0")) for run in runs[row].values()]
            drift = f"Moving 16 images changes logits of D4 and symmetrized networks by {max(exact, default=0):.0e}."
            lines += ["", drift]
    lines += ["", f"![The random splits, a dot for each seed]({RESULTS.stem}.png)"]
    return "\n".join(lines) + "\n"


def split_table(task: Task, runs: Runs, split: str) -> list[str]:
    """Lines of the table of a split; none if nothing was run on it."""
    done = {row: [run for key, run in runs[row].items() if key.startswith(split)] for row in runs}
    if not any(done.values()):
        return []
    poses = ["upright", "moved", *(["oblique"] if task.angles else [])]
    figures = [f"{figure}, upright" if pose == "upright" else pose for figure in task.figures for pose in poses]
    lines = ["", f"### {task.split_titles[split]}", ""]
    lines += [f"| network | pixels | parameters | training | seeds | {' | '.join(figures)} |"]
    lines += ["|---|" + "---:|" * (4 + len(figures))]
    for title, (row, kind) in task.lines.items():
        if done.get(row):
            first = done[row][0]
            minutes = statistics.mean(run["training seconds"] for run in done[row]) / 60
            cells = [title, first["pixels"], f"{first['parameters']:,}", f"{minutes:.1f}", len(done[row])]
            shown = [poses_shown(run, kind) for run in done[row]]
            cells += [ranged([pairs[pose][k] for pairs in shown]) for k in (0, 1) for pose in poses]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    missing = sorted(row for row in task.rows if not done.get(row))
    return lines + (["", f"Not run: {'; '.join(missing)}."] if missing else [])


def poses_shown(run: dict[str, Any], kind: str) -> dict[str, list[float]]:
    """Both figures by pose, of predictions from one view or from the mean of all."""

    def mean(pairs: list[list[float]]) -> list[float]:
        return [statistics.mean(values) for values in zip(*pairs, strict=True)]

    if kind == ALL:
        poses = {"upright": run["averaged"], "moved": run["averaged"]}
    else:
        poses = {"upright": run["views"][:1], "moved": run["views"][1:]}
    if "oblique" in run:
        poses["oblique"] = run["oblique"]["averaged" if kind == ALL else "views"]
    return {pose: mean(pairs) for pose, pairs in poses.items()}


def ranged(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.1f}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")


MARKERS = {  # by pose: how far below its line, and how it is drawn
    "upright": (-0.2, {"mfc": "#0072b2", "mec": "#0072b2", "ms": 6, "label": "as photographed"}),
    "moved": (0.05, {"mfc": "none", "mec": "#d55e00", "ms": 7, "label": "quarter turns and reflections"}),
    "oblique": (0.28, {"marker": "D", "mfc": "none", "mec": "#009e73", "ms": 5, "label": "by 22.5 and 45 degrees"}),
}


def picture(results: dict[str, Any]) -> Figure:
    """Accuracy of each line of the tables on the random splits, a mark for each seed and pose."""
    shown = {
        task: {title: line for title, line in task.lines.items() if line[0] in results[name]["runs"]}
        for name, task in TASKS.items()
        if name in results
    }
    heights = [1 + len(lines) for lines in shown.values()]
    figure = Figure(figsize=(8.4, 0.8 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    marks: dict[str, Line2D] = {}  # by pose
    for axes, task, name in zip(panels, shown, results, strict=True):
        marks |= panel(axes, task, shown[task], results[name]["runs"])
    figure.legend(handles=list(marks.values()), frameon=False, loc="outside lower center", ncols=len(marks))
    return figure


def panel(axes: Axes, task: Task, lines: dict[str, tuple[str, str]], runs: Runs) -> dict[str, Line2D]:
    """Draw a set; returns a mark of each pose."""
    marks = {}
    for place, (row, kind) in enumerate(lines.values()):
        for key, result in runs[row].items():
            for pose, pair in poses_shown(result, kind).items() if key.startswith("random") else ():
                below, style = MARKERS[pose]
                (marks[pose],) = axes.plot(pair[0], place + below, **{"marker": "o", "linestyle": "none", **style})
    if task.reference:
        accuracy, whose = task.reference
        axes.axvline(accuracy, color="grey", linewidth=1, linestyle="--")
        axes.text(accuracy - 0.2, -0.7, whose, color="grey", ha="right", va="center", fontsize=9)
    axes.set(ylim=(len(lines) - 0.5, -1))
    axes.set_title(task.title, loc="left", fontsize=11)
    axes.set_xlabel("accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    pixels = [next(iter(runs[row].values()))["pixels"] for row, _ in lines.values()]
    axes.set_yticks(range(len(lines)), [f"{title}, {n} px" for title, n in zip(lines, pixels, strict=True)])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    return marks


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(results: dict[str, Any]) -> None:
    """JSON, table and picture."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))
    picture(results).savefig(RESULTS.with_suffix(".png"), dpi=110)


def measure(name: str, load: Callable[[], Data], rows: list[str], seeds: list[int], splits: list[str]) -> None:
    """Run what the results do not have yet, and add it to them."""
    task, load = TASKS[name], cache(load)
    for split, seed, title in itertools.product(splits, seeds, rows):
        key = f"{split} {seed}"
        if key in load_results().get(name, {"runs": {}})["runs"].get(title, {}):
            continue
        result = run(task.rows[title], task, load(), split, seed, f"{title}, {key}")
        results = load_results()  # another process may have added to it
        part = results.setdefault(name, {"about": "", "runs": {}, "test images": {}})
        part["runs"].setdefault(title, {})[key] = result
        part["test images"][key] = " ".join(map(str, task.splits[split](load(), seed)[1].tolist()))
        versions = f"torch {torch.__version__.split('+')[0]}, equivision_timm {equivision_timm.__version__}"
        part["about"] = f"{date.today().isoformat()}, {versions}"
        save(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(TASKS), default="solar-cells")
    parser.add_argument("--folder", type=Path, default=deep_sky.FOLDER, help="of deep-sky, by default %(default)s")
    parser.add_argument("--full", action="store_true", help="all rows, three seeds, all splits")
    parser.add_argument("--table", action="store_true", help="train nothing, write table and picture")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these; by default the cheap ones")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 0, or 0 1 2 with --full")
    parser.add_argument("--splits", nargs="+", help="by default random")
    args = parser.parse_args()
    task = TASKS[args.set]
    rows = args.rows or [title for title, row in task.rows.items() if args.full or row.size <= 97]
    seeds = args.seeds or ([0, 1, 2] if args.full else [0])
    splits = args.splits or (list(task.splits) if args.full else ["random"])
    if not args.table:
        load = {"solar-cells": solar_cells.elpv, "deep-sky": lambda: deep_sky.load(args.folder)}[args.set]
        measure(args.set, load, rows, seeds, splits)
    save(load_results())


if __name__ == "__main__":
    main()
