"""Ablation of the design choices that make a network equivariant between the quarter turns.

    pip install '.[test,train]'
    python scripts/ablate_angle.py photographs   # errors by stage, random weights: a minute or two
    python scripts/ablate_angle.py digits        # accuracy by angle after training: some minutes for a row and seed
    python scripts/ablate_angle.py cost          # time on the CPU, one thread

Each writes its part of scripts/benchmarks/angle.json, and all parts as a table to angle.md and a picture to angle.png
beside it. Results of digits that are in the file are not trained again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage import data
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from train_digits import Recipe, load_digits, train

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.demo import turn
from equivision_timm.testing import angle_error

RESULTS = Path(__file__).parent / "benchmarks" / "angle.json"
SIZE = 225
SEEDS = (0, 1, 2)
DRAWS = 10  # of random weights
DIGIT_ANGLES = range(0, 360, 15)

BLUR = dict(aa_layer="blur5", avg_down=True)
SMOOTH = dict(**BLUR, low_pass=True)
ALIAS_FREE = dict(**SMOOTH, act_layer="silu", stem_pool="blur", even="box")
PHOTOGRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("c8resnet18_fast", {}),
    "five-tap blur behind the activation in front of each stride, blurred max-pooling": ("c8resnet18_fast", BLUR),
    "and smooth kernels (5x5 low pass), blurred image": ("c8resnet18_fast", SMOOTH),
    "and SiLU": ("c8resnet18_fast", dict(**SMOOTH, act_layer="silu")),
    "and blur alone as the pooling: alias-free": ("c8resnet18_fast", ALIAS_FREE),
    "alias-free, with three taps": ("c8resnet18_fast", {**ALIAS_FREE, "aa_layer": "blur"}),
    "alias-free, but smooth kernels that stride themselves": ("c8resnet18_fast", {**ALIAS_FREE, "aa_layer": ""}),
    "alias-free, but 3x3 kernels": ("c8resnet18_fast", {**ALIAS_FREE, "low_pass": False}),
    "alias-free, but ReLU": ("c8resnet18_fast", {**ALIAS_FREE, "act_layer": "relu"}),
    "alias-free, but GELU": ("c8resnet18_fast", {**ALIAS_FREE, "act_layer": "gelu"}),
    "alias-free, but Hardswish": ("c8resnet18_fast", {**ALIAS_FREE, "act_layer": "hard_swish"}),
    "alias-free, but deep stem": ("c8resnet18_fast", {**ALIAS_FREE, "stem_type": "deep"}),
    "d8resnet18_fast as it is": ("d8resnet18_fast", {}),
    "d8resnet18_fast alias-free": ("d8resnet18_fast", ALIAS_FREE),
    "d8resnetaf18_fast: five fields for three": ("d8resnetaf18_fast", {}),
    "d8resnet18 alias-free": ("d8resnet18", ALIAS_FREE),
    "c8resnet50_fast as it is": ("c8resnet50_fast", {}),
    "c8resnet50_fast alias-free": ("c8resnet50_fast", ALIAS_FREE),
    "resnet18 of timm": ("resnet18", {}),
}
EVEN_SIZE = 224
EVEN_PHOTOGRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is, 224 px": ("c8resnet18_fast", {}),
    "alias-free, 224 px": ("c8resnetaf18_fast", {}),
    "alias-free, 224 px, five taps there too": ("c8resnetaf18_fast", {"even": ""}),
}
DIGITS: dict[str, Recipe] = {
    "plain, upright": Recipe("test_c1resnet"),
    "plain, all rotations": Recipe("test_c1resnet", limit=180),
    "C8 as it is, upright": Recipe("test_c8resnet"),
    "C8 as it is, up to 22.5 degrees": Recipe("test_c8resnet", limit=22.5),
    "C8 alias-free, upright": Recipe("test_c8resnet", arguments=ALIAS_FREE),
    "C8 alias-free, upright, 64 px": Recipe(
        "test_c8resnet", arguments={**ALIAS_FREE, "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    ),
    "C8 alias-free, up to 22.5 degrees": Recipe("test_c8resnet", limit=22.5, arguments=ALIAS_FREE),
    "C8 alias-free, up to 22.5 degrees, 30 epochs": Recipe(
        "test_c8resnet", epochs=30, limit=22.5, arguments=ALIAS_FREE
    ),
    "C8 alias-free, up to 22.5 degrees, 30 epochs, batches of 64": Recipe(
        "test_c8resnet", epochs=30, limit=22.5, batch_size=64, arguments=ALIAS_FREE
    ),
    "plain, all rotations, 30 epochs, batches of 64": Recipe("test_c1resnet", epochs=30, limit=180, batch_size=64),
}
COST = {"c8resnet50": {}, "c8resnet50 alias-free": ALIAS_FREE, "c8resnet18": {}, "c8resnet18 alias-free": ALIAS_FREE}


def photographs(size: int) -> torch.Tensor:
    """The middle of astronaut and coffee, [2, 3, size, size], normalised."""
    images = []
    for photograph in (data.astronaut(), data.coffee()):
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None] / 255  # [1, 3, H, W]
        height, width = pixels.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[..., top : top + side, left : left + side]
        images.append(F.interpolate(square, (size, size), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (torch.cat(images) - mean) / std


def measure_photographs(results: dict[str, Any]) -> None:
    """The error of each stage at 45 degrees, mean over the photographs, for each draw of the weights."""
    rows = [(SIZE, row) for row in PHOTOGRAPHS.items()] + [(EVEN_SIZE, row) for row in EVEN_PHOTOGRAPHS.items()]
    for size, (title, (name, arguments)) in rows:
        images = photographs(size)
        errors: dict[str, list[float]] = {}
        quarter = 0.0
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            model = timm.create_model(name, **arguments)
            calibrate_norms(model, images)
            for stage, by_angle in angle_error(model, images, [45, 90]).items():
                errors.setdefault(stage, []).append(by_angle[45])
                quarter = max(quarter, by_angle[90])
        results[title] = {"errors": errors, "quarter": quarter}
        print(title, {stage: round(statistics.mean(values), 3) for stage, values in errors.items()}, flush=True)


@torch.inference_mode()
def accuracy(model: nn.Module, digits: torch.Tensor, labels: torch.Tensor, degrees: float) -> float:
    """Accuracy in per cent on digits [N, 28, 28] uint8, rotated by an angle."""
    images = turn(digits, degrees, model.pretrained_cfg["input_size"][-1]).split(250)
    right = [(model(batch.expand(-1, 3, -1, -1)).argmax(1)) for batch in images]  # grey as RGB
    return 100 * (torch.cat(right) == labels).double().mean().item()


def measure_digits(results: dict[str, Any], titles: list[str], seeds: list[int], keep: Callable[[], None]) -> None:
    """Accuracy on the held-out digits at every angle, by seed; stored after each."""
    parts = load_digits()
    digits, labels = (torch.from_numpy(parts["held_out"].digits), torch.from_numpy(parts["held_out"].labels).long())
    for seed in seeds:
        for title in titles:
            done = results.setdefault(title, {})
            if str(seed) in done:
                continue
            model = train(DIGITS[title], parts["train"], seed)
            done[str(seed)] = [accuracy(model, digits, labels, angle) for angle in DIGIT_ANGLES]
            keep()
            print(f"{title}, seed {seed}: {_summary(done[str(seed)])}", flush=True)


@torch.no_grad()
def calibrate_norms(model: nn.Module, images: torch.Tensor) -> None:
    """The running statistics of all batch norms become those of `images` [B, C, n, n], masked as by `angle_error`."""
    axis = torch.linspace(-1, 1, images.shape[-1])
    t = ((1 - torch.hypot(axis[:, None], axis[None, :])) / 0.15).clamp(0, 1)  # smooth from radius 0.85 to the border
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls: of one
    model.train()(images * t * t * (3 - 2 * t))
    model.eval()


def measure_cost(results: dict[str, Any]) -> None:
    """Seconds of one thread for two images of 225 x 225 pixels: the best of five, the models interleaved."""
    torch.set_num_threads(1)
    models = {title: timm.create_model(title.split()[0], **arguments) for title, arguments in COST.items()}
    images = torch.randn(2, 3, SIZE, SIZE)
    for mode in ("eval", "train"):
        for _ in range(5):
            for title, model in models.items():
                model.train(mode == "train")
                start = time.process_time()
                with torch.set_grad_enabled(mode == "train"):
                    output = model(images)
                if mode == "train":
                    output.sum().backward()
                seconds = time.process_time() - start
                best = results.setdefault(title, {})
                best[mode] = min(best.get(mode, seconds), seconds)
    print(results)


def _summary(by_angle: list[float]) -> str:
    return f"upright {by_angle[0]:.1f}, mean {statistics.mean(by_angle):.1f}, worst {min(by_angle):.1f}"


def table(results: dict[str, Any]) -> str:
    """All parts as Markdown."""
    lines = ["# Between the quarter turns", "", "Written by `scripts/ablate_angle.py`.", ""]
    if results["photographs"]:
        lines += [
            "## Photographs",
            "",
            f"`equivision_timm.testing.angle_error` at 45 degrees: astronaut and coffee of scikit-image, {SIZE} px, "
            f"random weights, calibrated norms; mean over {DRAWS} draws of the weights, in brackets the largest.",
            "",
            "| network | stem | layer1 | layer2 | layer3 | layer4 | 90 degrees, any stage |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for title, row in results["photographs"].items():
            cells = [f"{statistics.mean(values):.3f} ({max(values):.3f})" for values in row["errors"].values()]
            lines.append(f"| {title} | {' | '.join(cells)} | {row['quarter']:.0e} |")
        lines.append("")
    if results["digits"]:
        lines += [
            "## Digits",
            "",
            "Held-out handwritten digits at 24 angles, accuracy in per cent; networks of the size of `test_c8resnet` "
            "(about 100,000 parameters), 12 epochs of batches of 128 where nothing else is "
            "stated; mean over the seeds.",
            "",
            "| network and training | seeds | upright | mean over angles | worst angle |",
            "|---|---:|---:|---:|---:|",
        ]
        for title, seeds in results["digits"].items():
            if seeds:
                runs = list(seeds.values())
                figures = [[run[0] for run in runs], [statistics.mean(run) for run in runs], [min(run) for run in runs]]
                cells = " | ".join(f"{statistics.mean(figure):.1f}" for figure in figures)
                lines.append(f"| {title} | {len(runs)} | {cells} |")
        lines.append("")
    if results["cost"]:
        lines += [
            "## Cost",
            "",
            f"Seconds of one CPU thread, 2 x 3 x {SIZE} x {SIZE}, float32, torch {torch.__version__}; train: forward "
            "and backward.",
            "",
            "| network | eval | train |",
            "|---|---:|---:|",
        ]
        for title, row in results["cost"].items():
            plain = results["cost"][title.split()[0]]
            cells = [f"{row[mode]:.2f} ({row[mode] / plain[mode]:.2f} times)" for mode in ("eval", "train")]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


STAGES_DRAWN = {  # rows of the photographs
    "resnet18 of timm": ("plain: timm's resnet18", "#d55e00"),
    "as it is": ("c8resnet18_fast", "#56b4e9"),
    "and blur alone as the pooling: alias-free": ("c8resnetaf18_fast", "#0072b2"),
}
ANGLES_DRAWN = {  # rows of the digits
    "plain, upright": ("plain", "#d55e00", "-"),
    "plain, all rotations": ("plain, all rotations", "#009e73", "-"),
    "C8 as it is, upright": ("C8", "#56b4e9", "-"),
    "C8 alias-free, upright": ("C8 alias-free", "#0072b2", "-"),
    "C8 alias-free, up to 22.5 degrees": ("C8 alias-free, up to 22.5°", "#0072b2", "--"),
}


def picture(results: dict[str, Any]) -> Figure:
    """Left the errors of the stages at 45 degrees, right accuracy against the angle; both means over the seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    stages = ["layer1", "layer2", "layer3", "layer4"]
    for place, (title, (label, colour)) in enumerate(STAGES_DRAWN.items()):
        errors = results["photographs"][title]["errors"]
        values = [100 * statistics.mean(errors[stage]) for stage in stages]
        bars = left.bar([i + 0.27 * (place - 1) for i in range(4)], values, 0.27, label=label, color=colour)
        left.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    left.set_xticks(range(4), stages)
    left.set_ylabel("error of the rotated features, %")
    left.set_title("Photographs rotated by 45°", fontsize=11, loc="left")
    left.set_ylim(0, 135)
    left.legend(frameon=False, loc="upper left", fontsize=9)
    angles = [*DIGIT_ANGLES, 360]
    for title, (label, colour, line) in ANGLES_DRAWN.items():
        runs = list(results["digits"].get(title, {}).values())
        if runs:
            mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
            label = f"{label}: at worst {statistics.mean(min(run) for run in runs):.1f} %"
            right.plot(angles, [*mean, mean[0]], line, color=colour, label=label, linewidth=2)
    right.set_xticks(range(0, 361, 45), [f"{angle}°" for angle in range(0, 361, 45)])
    right.set_ylim(0, 102)
    right.set_ylabel("accuracy on digits, %")
    right.set_title("Held-out digits, rotated", fontsize=11, loc="left")
    right.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.56), fontsize=9)  # where no curve is
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("photographs", "digits", "cost", "table"))
    parser.add_argument("--rows", nargs="+", choices=DIGITS, default=list(DIGITS), help="of the digits; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the digits; default: 0 1 2")
    args = parser.parse_args()
    mine = _read()[args.part] if args.part == "digits" else {}

    def keep() -> None:
        """Write this part, and the other parts as they now are in the file."""
        results = _read()
        if args.part in results:
            results[args.part] = mine
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(results))
        if results["photographs"]:
            picture(results).savefig(RESULTS.with_suffix(".png"), dpi=110)

    if args.part == "photographs":
        measure_photographs(mine)
    elif args.part == "digits":
        measure_digits(mine, args.rows, args.seeds, keep)
    elif args.part == "cost":
        measure_cost(mine)
    keep()


def _read() -> dict[str, Any]:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {part: results.get(part, {}) for part in ("photographs", "digits", "cost")}


if __name__ == "__main__":
    main()
