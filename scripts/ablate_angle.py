"""Ablation of the design choices that make a network equivariant at angles between multiples of 90 degrees.

    pip install '.[test,train]'
    python scripts/ablate_angle.py photographs   # errors by stage, random weights: a minute or two
    python scripts/ablate_angle.py digits        # accuracy by angle after training: some minutes for a row and seed
    python scripts/ablate_angle.py cost          # time on the CPU, one thread
    python scripts/ablate_angle.py table         # measure nothing, write table and picture again

Each part is written to scripts/benchmarks/angle.json, all parts as tables to angle.md and as a picture to angle.png.
Networks whose results are in the file are not trained again.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from report import BENCHMARKS, markdown, read, write
from skimage import data
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import center_crop, normalize
from train_digits import Recipe, load_digits, train

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.demo import turn
from equivision_timm.testing import angle_error

RESULTS = BENCHMARKS / "angle"
SIZE = 225
SEEDS = (0, 1, 2)
DRAWS = 10  # of random weights
DIGIT_ANGLES = range(0, 360, 15)

BLUR = dict(aa_layer="blur5", avg_down=True)
SMOOTH = dict(**BLUR, low_pass=True)
ALIAS_FREE = dict(**SMOOTH, act_layer="silu", stem_pool="blur", even="box")
PHOTOGRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("c8resnet18_fast", {}),
    "five-tap blur between activation and stride, blurred max-pooling": ("c8resnet18_fast", BLUR),
    "and smooth kernels (5x5 low pass), blurred image": ("c8resnet18_fast", SMOOTH),
    "and SiLU": ("c8resnet18_fast", dict(**SMOOTH, act_layer="silu")),
    "and only blur as pooling: alias-free": ("c8resnet18_fast", ALIAS_FREE),
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
        square = center_crop(pixels, min(pixels.shape[2:]))
        images.append(F.interpolate(square, (size, size), mode="bilinear", antialias=True))
    return normalize(torch.cat(images), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def measure_photographs() -> dict[str, Any]:
    """The error of each stage at 45 degrees, mean over the photographs, for each draw of the weights."""
    results = {}
    for title, (name, arguments) in {**PHOTOGRAPHS, **EVEN_PHOTOGRAPHS}.items():
        images = photographs(EVEN_SIZE if title in EVEN_PHOTOGRAPHS else SIZE)
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
    return results


@torch.inference_mode()
def accuracy(model: nn.Module, digits: torch.Tensor, labels: torch.Tensor, degrees: float) -> float:
    """Accuracy in per cent on digits [N, 28, 28] uint8, rotated by an angle."""
    images = turn(digits, degrees, model.pretrained_cfg["input_size"][-1]).split(250)
    predicted = [model(batch.expand(-1, 3, -1, -1)).argmax(1) for batch in images]  # grey as RGB
    return 100 * (torch.cat(predicted) == labels).double().mean().item()


def measure_digits(results: dict[str, Any], titles: list[str], seeds: list[int], save: Callable[[], None]) -> None:
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
            save()
            print(f"{title}, seed {seed}: mean {statistics.mean(done[str(seed)]):.1f}", flush=True)


@torch.no_grad()
def calibrate_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Set the running statistics of all batch norms to those of `images` [B, C, n, n], masked as by `angle_error`."""
    axis = torch.linspace(-1, 1, images.shape[-1])
    t = ((1 - torch.hypot(axis[:, None], axis[None, :])) / 0.15).clamp(0, 1)  # smooth from radius 0.85 to the border
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all calls: of one
    model.train()(images * t * t * (3 - 2 * t))
    model.eval()


def measure_cost() -> dict[str, dict[str, float]]:
    """Seconds of one thread for two images of 225 x 225 pixels: the best of five, the models interleaved."""
    torch.set_num_threads(1)
    models = {title: timm.create_model(title.split()[0], **arguments) for title, arguments in COST.items()}
    images = torch.randn(2, 3, SIZE, SIZE)
    results: dict[str, dict[str, float]] = {title: {} for title in COST}
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
                results[title][mode] = min(results[title].get(mode, seconds), seconds)
    return results


def table(results: dict[str, Any]) -> str:
    """All parts as Markdown."""
    photographs = [
        [title, *(f"{statistics.mean(v):.3f} ({max(v):.3f})" for v in row["errors"].values()), f"{row['quarter']:.0e}"]
        for title, row in results["photographs"].items()
    ]
    digits = []
    for title, runs in results["digits"].items():
        by_seed = [(run[0], statistics.mean(run), min(run)) for run in runs.values()]
        digits.append([title, len(runs), *(f"{statistics.mean(figure):.1f}" for figure in zip(*by_seed, strict=True))])
    cost = []
    for title, row in results["cost"].items():
        plain = results["cost"][title.split()[0]]
        cost.append([title, *(f"{row[mode]:.2f} ({row[mode] / plain[mode]:.2f} times)" for mode in ("eval", "train"))])
    return f"""# Between the quarter turns

Written by `scripts/ablate_angle.py`.

## Photographs

`equivision_timm.testing.angle_error` at 45 degrees: astronaut and coffee of scikit-image, {SIZE} px, random weights, \
calibrated norms; mean over {DRAWS} draws of the weights, in brackets the largest.

{markdown(["network", "stem", "layer1", "layer2", "layer3", "layer4", "90 degrees, any stage"], photographs)}

## Digits

Held-out handwritten digits at 24 angles, accuracy in per cent; networks of the size of `test_c8resnet` (about 100,000 \
parameters), 12 epochs of batches of 128 unless stated otherwise; mean over the seeds.

{markdown(["network and training", "seeds", "upright", "mean over angles", "worst angle"], digits)}

## Cost

Seconds of one CPU thread, 2 x 3 x {SIZE} x {SIZE}, float32, torch {torch.__version__}; train: forward and backward.

{markdown(["network", "eval", "train"], cost)}
"""


STAGES_DRAWN = {  # rows of the photographs
    "resnet18 of timm": ("plain: timm's resnet18", "#d55e00"),
    "as it is": ("c8resnet18_fast", "#56b4e9"),
    "and only blur as pooling: alias-free": ("c8resnetaf18_fast", "#0072b2"),
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
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
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
        runs = list(results["digits"][title].values())
        mean = [statistics.mean(values) for values in zip(*runs, strict=True)]
        label = f"{label}: at worst {statistics.mean(min(run) for run in runs):.1f} %"
        right.plot(angles, [*mean, mean[0]], line, color=colour, label=label, linewidth=2)
    right.set_xticks(range(0, 361, 45), [f"{angle}°" for angle in range(0, 361, 45)])
    right.set_ylim(0, 102)
    right.set_ylabel("accuracy on digits, %")
    right.set_title("Held-out digits, rotated", fontsize=11, loc="left")
    right.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.56), fontsize=9)  # between the curves
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("photographs", "digits", "cost", "table"))
    parser.add_argument("--rows", nargs="+", choices=DIGITS, default=list(DIGITS), help="of the digits; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the digits; default: 0 1 2")
    args = parser.parse_args()
    results = read(RESULTS)

    def save() -> None:
        write(RESULTS, results, table(results), picture(results))

    if args.part == "photographs":
        results["photographs"] = measure_photographs()
    elif args.part == "digits":
        measure_digits(results["digits"], args.rows, args.seeds, save)
    elif args.part == "cost":
        results["cost"] = measure_cost()
    save()


if __name__ == "__main__":
    main()
