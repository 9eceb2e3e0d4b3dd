"""Time networks of this package against the dense network of the same width and timm's ResNet.

    python scripts/benchmark.py                                      # the models of the README, eval and train
    python scripts/benchmark.py c8resnet50 'd8*' --modes eval --batch-size 4 --size 225
    python scripts/benchmark.py c8resnet50 --escnn                   # and the escnn network (extra `escnn`)
    python scripts/benchmark.py d4vit_base_patch16_224               # against timm's ViT of the same size
    python scripts/benchmark.py d4convnext_tiny --name convnext      # against timm's ConvNeXt of the same size
    python scripts/benchmark.py c8resnet50 --layers                  # every layer, every strategy
    python scripts/benchmark.py --draw                               # only the picture, of stored results
    python scripts/benchmark.py c8resnet50 --device cuda --amp bfloat16 --channels-last --compile --batch-size 128

The dense network has plain `nn.Conv2d` and `nn.BatchNorm2d` with the same number of channels, ReLU and shortcut in
place as in timm's ResNets, and runs in each of its forms: eager or compiled, NCHW or channels-last, for eval also with
batch norms folded into the convolutions. The fastest form is compared. The equivariant network trains as `create_model`
makes it and infers as `fuse` makes it, timm's network runs as `create_model` makes it; both are channels-last or
compiled if these options are given.

Each network runs in its own process. After warm-up the networks alternate, so that a busy machine slows all equally;
reported are medians and ratios of medians. The time is CPU time for one thread, else wall time. The fastest dense form
is chosen before, from three steps of each. A training step is forward, backward and SGD with momentum. Peak memory is
the growth of the process until it is warm. glibc's allocator is set to keep freed memory (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_), which avoids page faults for each new feature map. On other devices than the CPU the clock
waits for the device, and memory is the device's.

Writes NAME.json, NAME.md and NAME.png into --out (default: scripts/benchmarks).
"""

import argparse
import contextlib
import fnmatch
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from report import BENCHMARKS, markdown, processor, read, today, write
from tqdm import tqdm

from equivision_timm import fuse
from equivision_timm.layers import ConvNormAct, SteerableConv2d, conv_input_shapes
from equivision_timm.layers.strategies import STRATEGIES
from equivision_timm.layers.strategies.basis import block_shapes
from equivision_timm.models import model_names
from equivision_timm.weights.model_card import complexity

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
DEFAULT_MODELS = ("c8resnet50", "d4resnet50", "c4resnet50", "d8resnet18", "c8resnet18", "d4resnet18", "c4resnet18")
DENSE_FORMS = ("dense", "dense channels-last", "dense compiled", "dense compiled channels-last")


@dataclass(frozen=True)
class Setting:
    """Images, threads and device of a measurement."""

    batch_size: int = 8
    size: int = 224  # pixels along a side
    threads: int = 1
    device: str = "cpu"
    amp: str = ""  # type of autocast, such as 'bfloat16'
    channels_last: bool = False  # the forms 'ours' and 'timm'
    compiled: bool = False  # the forms 'ours' and 'timm'

    def is_channels_last(self, form: str) -> bool:
        return "channels-last" in form or (self.channels_last and form in ("ours", "timm"))

    def is_compiled(self, form: str) -> bool:
        return "compiled" in form or (self.compiled and form in ("ours", "timm"))

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.amp))

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


class PlainUnit(nn.Module):
    """Convolution, norm, shortcut and activation as in timm's ResNets."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.conv(x))
        if shortcut is not None:
            x += shortcut
        return self.act(x)


def plain(model: nn.Module) -> nn.Module:
    """Change `model` into a plain network with as many channels everywhere, ReLU and shortcuts in place.

    Batch norms are new unless `fuse` has folded them.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = True
        elif isinstance(module, ConvNormAct):
            conv, norm = module.conv, module.norm
            if isinstance(conv, SteerableConv2d):
                conv = conv.fuse()
                norm = nn.BatchNorm2d(conv.out_channels)
            parent, _, child = name.rpartition(".")
            unit = PlainUnit(conv, norm, module.act).requires_grad_().train(module.training)
            setattr(model.get_submodule(parent), child, unit)
    return model


def family(name: str) -> str:
    """Family of timm's rival; only ResNets are also compared with the dense network."""
    return "ConvNeXt" if "convnext" in name else "ViT" if "vit_" in name else "ResNet"


def timms_rival(name: str) -> str:
    """timm's network of the same depth, and of the same width unless it is a ResNet."""
    if family(name) == "ConvNeXt":
        return "test_convnext" if name.startswith("test_") else name[name.index("convnext") :]
    if family(name) == "ViT":
        size, patch = name[name.index("vit_") :].split("_")[1:3]
        return f"vit_{size}_{patch}_224"
    if name.startswith("test_"):
        return "test_resnet"
    same = name[name.index("resnet") :].split("_")[0]
    return same if timm.is_model(same) else "resnet" + re.sub(r"\D", "", same)


def build(form: str, name: str, mode: str, setting: Setting) -> nn.Module:
    """A form of the network, in train or eval mode, on the device."""
    torch.manual_seed(0)
    if form == "timm":
        model = timm.create_model(timms_rival(name))
    else:
        model = timm.create_model(name)
        if form.startswith("dense"):
            model = plain(fuse(model, "dense") if "folded" in form else model)
        elif form == "escnn":
            from escnn_network import to_escnn  # needs the extra `escnn`

            model = to_escnn(model)
    model.train(mode == "train").to(setting.device)
    if setting.is_channels_last(form):
        model = model.to(memory_format=torch.channels_last)
    if form == "ours" and mode == "eval":
        model = fuse(model, input_size=setting.size)
    return torch.compile(model) if setting.is_compiled(form) else model


def make_step(model: nn.Module, form: str, mode: str, setting: Setting) -> Callable[[], None]:
    """One forward pass without gradients, or one training step."""
    shape = (setting.batch_size, 3, setting.size, setting.size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    if setting.is_channels_last(form):
        x = x.contiguous(memory_format=torch.channels_last)
    if mode == "eval":

        def step() -> None:
            with torch.inference_mode(), setting.autocast():
                model(x)
            setting.synchronize()

        return step

    target = torch.arange(setting.batch_size, device=setting.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        setting.synchronize()

    return step


def prepare_step(form: str, name: str, mode: str, setting: Setting) -> Callable[[], None]:
    """The timed step: creation, or a step of the created network."""
    if mode == "create":
        return partial(build, form, name, "train", setting)  # not fused
    return make_step(build(form, name, mode, setting), form, mode, setting)


class Runner:
    """A network in its own process, warm, ready for timed steps.

    Args:
        form: its name in the results.
        prepare: makes the step, in the process; picklable.
        setting: threads and device.

    Raises:
        RuntimeError: the process ended, most likely for lack of memory.
    """

    def __init__(self, form: str, prepare: Callable[[], Callable[[], None]], setting: Setting) -> None:
        self.form = form
        context = get_context("spawn")  # starts with the allocator's settings
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, prepare, setting), daemon=True)
        self.process.start()
        other.close()
        self.memory = self._receive()  # growth of the process, MB

    def step(self) -> float:
        """Seconds of one step: CPU time of a single thread, else wall time."""
        self.connection.send("step")
        return self._receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join()

    def _receive(self) -> float:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process that measures {self.form!r} ended with exit code {self.process.exitcode}: if it is -9, "
                "for lack of memory, use a smaller --batch-size"
            ) from None


def serve(connection, prepare: Callable[[], Callable[[], None]], setting: Setting) -> None:
    """Main function of a `Runner`'s process: warm up, then a timed step for every message."""
    torch.set_num_threads(setting.threads)
    # CPU time of one thread excludes the time of other programs
    clock = time.process_time if setting.threads == 1 and setting.device == "cpu" else time.perf_counter
    before = peak_memory(setting.device)
    step = prepare()
    for _ in range(3):
        step()
    connection.send(peak_memory(setting.device) - before)
    with contextlib.suppress(EOFError):  # the other side closed
        while connection.recv():
            start = clock()
            step()
            connection.send(clock() - start)


def peak_memory(device: str) -> float:
    """Peak memory of this process in MB, on a GPU or (Linux) in RAM; `getrusage` would include the parent's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024  # kB


def in_turns(
    steps: dict[str, Callable[[], Callable[[], None]]], repeats: int, setting: Setting
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each form and its peak memory in MB, measured alternately."""
    with contextlib.ExitStack() as stack:
        runners = []
        for form, prepare in steps.items():
            runners.append(Runner(form, prepare, setting))
            stack.callback(runners[-1].close)
        seconds: dict[str, list[float]] = {form: [] for form in steps}
        for _ in range(repeats):
            for runner in runners:
                seconds[runner.form].append(runner.step())
        return seconds, {runner.form: runner.memory for runner in runners}


def compare(name: str, mode: str, dense: list[str], others: list[str], repeats: int, setting: Setting) -> dict:
    """One row of results: the equivariant network, the fastest of the forms `dense`, and `others`."""
    prepare = {form: partial(prepare_step, form, name, mode, setting) for form in ("ours", *dense, *others)}
    tried = {form: statistics.median(in_turns({form: prepare[form]}, 3, setting)[0][form]) for form in dense}
    best = min(tried, key=tried.__getitem__) if tried else None
    forms = ["ours", *([best] if best else []), *others]
    seconds, memory = in_turns({form: prepare[form] for form in forms}, repeats, setting)
    median = {form: statistics.median(values) for form, values in seconds.items()}
    compared = {"dense": best, **{form: form for form in others}}
    ratio = {key: median[form] / median["ours"] for key, form in compared.items() if form}
    result = {"model": name, "mode": mode, "median": median, "best dense": best, "ratio": ratio}
    if best:
        result |= {"memory": {"ours": memory["ours"], "dense": memory[best]}, "dense forms, alone": tried}
    if family(name) != "ResNet":
        for key, index in (("parameters", 0), ("operations", 1)):
            result[key] = {"ours": complexity(name)[index], "timm": complexity(timms_rival(name))[index]}
        result["memory"] = {form: memory[form] for form in ("ours", "timm")}
    return {**result, "seconds": seconds}


def in_new_process(function: Callable, *args):
    """function(*args) in a fresh process, which starts with the allocator's settings."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def import_seconds(repeats: int) -> float:
    """CPU time that `import equivision_timm` adds to `import timm`, median of fresh processes."""
    code = "import timm, time; t = time.process_time(); import equivision_timm; print(time.process_time() - t)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return statistics.median(float(run.stdout) for run in runs)


def measure_layers(name: str, batch_size: int, size: int, repeats: int, threads: int) -> list[dict]:
    """Seconds of each strategy for each distinct convolution of a network, forward and training."""
    torch.set_num_threads(threads)
    model = timm.create_model(name)
    kinds: dict[tuple, list[str]] = {}
    for layer_name, shape in conv_input_shapes(model, torch.zeros(1, 3, size, size)).items():
        layer = model.get_submodule(layer_name)
        kind = (layer.in_fields, layer.out_fields, layer.kernel_size, layer.stride, layer.input_type)
        kinds.setdefault((*kind, *shape[1:]), []).append(layer_name)

    rows = []
    for (i, o, k, stride, input_type, channels, height, width), names in tqdm(kinds.items(), desc=name, leave=False):
        x = torch.randn(batch_size, channels, height, width)
        group = model.group
        layer = SteerableConv2d(i, o, k, group, input_type, stride)
        described = layer.describe(x.device, x.dtype)
        strategies = [name for name, strategy in STRATEGIES.items() if strategy.supports(described) is None]
        made = {s: SteerableConv2d(i, o, k, group, input_type, stride, strategy=s).eval() for s in strategies}
        for layer in made.values():
            layer.load_state_dict(made["expand"].state_dict())
        seconds: dict[tuple[str, str], list[float]] = {}
        for repeat in range(repeats + 1):  # the first warms up
            for s, layer in made.items():
                start = time.perf_counter()
                with torch.inference_mode():
                    y = layer(x)
                middle = time.perf_counter()
                layer(x.requires_grad_()).backward(y.clone())
                if repeat:
                    seconds.setdefault((s, "eval"), []).append(middle - start)
                    seconds.setdefault((s, "train"), []).append(time.perf_counter() - middle)
        pixels = batch_size * y.shape[2] * y.shape[3]
        dense = pixels * y.shape[1] * channels * k * k
        shapes = block_shapes(layer.kernel.name) if input_type == "regular" else ()
        blocks = pixels * i * o * sum(copies * n * size**2 for copies, n, size in shapes)
        products = {s: dense if s == "expand" else blocks for s in strategies}
        auto = layer.strategy_for(x.shape, x.device)
        row = {"layer": names[0], "count": len(names), "fields": f"{i} -> {o}", "kernel": k, "stride": stride}
        row |= {"size": height, "auto": auto}
        for (s, mode), values in seconds.items():
            passes = 1 if mode == "eval" else 3  # the backward pass counts twice
            row[f"{s} {mode} ms"] = 1e3 * statistics.median(values)
            row[f"{s} {mode} GFLOP/s"] = 2e-9 * passes * products[s] / statistics.median(values)
        rows.append(row)
    for mode in ("eval", "train"):
        total = sum(row["count"] * row[f"{row['auto']} {mode} ms"] for row in rows)
        for row in rows:
            row[f"{mode} share"] = row["count"] * row[f"{row['auto']} {mode} ms"] / total
    return rows


def layer_table(layers: list[dict]) -> str:
    """Time and rate of products for each layer and strategy, and the choice of `auto`."""
    fast = [s for s in STRATEGIES if s != "expand"]
    columns = ["layer", "times", "fields", "kernel", "input", "eval: expand, ms (GFLOP/s)"]
    columns += [*fast, "train: expand, ms", *fast, "auto", "share of eval", "of train"]
    rows = []
    for layer in layers:
        stride = f"/{layer['stride']}" if layer["stride"] > 1 else ""
        row = [f"`{layer['layer']}`", layer["count"], layer["fields"], f"{layer['kernel']}x{layer['kernel']}{stride}"]
        row.append(layer["size"])
        for mode in ("eval", "train"):
            for s in ("expand", *fast):
                cell = f"{layer[f'{s} {mode} ms']:.1f}" if f"{s} {mode} ms" in layer else None
                row.append(f"{cell} ({layer[f'{s} {mode} GFLOP/s']:.0f})" if cell and mode == "eval" else cell)
        rows.append([*row, layer["auto"], f"{layer['eval share']:.0%}", f"{layer['train share']:.0%}"])
    return markdown(columns, rows)


def result_table(results: list[dict]) -> str:
    columns = ["model", "mode", "ours, ms", "best dense, ms", "its form", "**times faster than dense**"]
    columns += ["than escnn"] if any("escnn" in result["ratio"] for result in results) else []
    columns += ["than timm's ResNet", "peak memory: ours, MB", "dense, MB"]
    rows = []
    for result in results:
        best, memory = result["best dense"], result.get("memory", {})
        row = [f"`{result['model']}`", result["mode"], f"{1e3 * result['median']['ours']:.0f}"]
        row += [f"{1e3 * result['median'][best]:.0f}", best] if best else [None, None]
        keys = ("dense", "escnn", "timm") if "than escnn" in columns else ("dense", "timm")
        row += [f"{result['ratio'][key]:.2f}" if key in result["ratio"] else None for key in keys]
        rows.append(row + [f"{memory[key]:.0f}" if key in memory else None for key in ("ours", "dense")])
    return markdown(columns, rows)


def transformer_table(results: list[dict]) -> str:
    """Multiples of timm's network of the same size: time, memory, 10^9 multiply-accumulates of an image."""
    columns = ["model", "mode", "ours, ms", "timm's, ms", "**time, of timm's**", "memory", "operations, of timm's"]
    rows = []
    for result in results:
        median, operations = result["median"], result["operations"]
        row = [f"`{result['model']}`", result["mode"], f"{1e3 * median['ours']:.0f}", f"{1e3 * median['timm']:.0f}"]
        counts = f"{operations['ours']:.1f} / {operations['timm']:.1f} = {operations['ours'] / operations['timm']:.2f}"
        memory = result["memory"]["ours"] / result["memory"]["timm"]
        rows.append([*row, f"{median['ours'] / median['timm']:.2f}", f"{memory:.2f}", counts])
    return markdown(columns, rows)


BARS = {"ours": ("ours", "#0072b2"), "dense": ("dense, as many channels, at its best", "0.65"), "timm": ("", "#d55e00")}


def picture(results: list[dict], title: str) -> Figure:
    """Bars: time of a step of the equivariant, the best dense and timm's network, a panel for each mode."""
    modes = [mode for mode in ("eval", "train") if any(result["mode"] == mode for result in results)]
    names = list(dict.fromkeys(result["model"] for result in results))
    figure = Figure(figsize=(5.2 * len(modes), 0.75 * len(names) + 1.8), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)
    height = 0.8 / len(BARS)
    for axis, mode in zip(panels[0], modes, strict=True):
        for place, (key, (label, colour)) in enumerate(BARS.items()):
            found = {r["model"]: r for r in results if r["mode"] == mode and (key == "ours" or key in r["ratio"])}
            rows = [row for row, name in enumerate(names) if name in found]
            ours = [1e3 * found[names[row]]["median"]["ours"] for row in rows]
            ratios = [found[names[row]]["ratio"].get(key, 1) for row in rows]
            values = [milliseconds * ratio for milliseconds, ratio in zip(ours, ratios, strict=True)]
            bars = axis.barh(
                [row + (place - 1) * height for row in rows], values, height, label=label or rivals(names), color=colour
            )
            words = [f"{milliseconds:.0f}" for milliseconds in values]
            if key != "timm":
                multiples = [r / found[names[row]]["ratio"]["timm"] for row, r in zip(rows, ratios, strict=True)]
                words = [f"{word} ({multiple:.1f}×)" for word, multiple in zip(words, multiples, strict=True)]
            axis.bar_label(bars, words, padding=3, fontsize=9)
        axis.set_title({"eval": "inference", "train": "training step"}[mode], fontsize=12)
        axis.set_xlabel("milliseconds (multiple of timm's)", fontsize=11)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.16)  # space for the last label
        axis.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_yticks(range(len(names)), names, fontsize=11)
    panels[0, 0].invert_yaxis()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(BARS), frameon=False, fontsize=11)
    figure.supxlabel(textwrap.fill(title, 60 * len(modes)), fontsize=9, color="0.35")
    return figure


def rivals(names: list[str]) -> str:
    """Label of timm's networks."""
    return f"timm's {' or '.join(sorted(set(map(family, names))))} of the same depth"


def device_name(device: str) -> str:
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(DEFAULT_MODELS), help="names or patterns (default: README's)")
    parser.add_argument("--modes", nargs="+", choices=("create", "eval", "train"), default=["create", "eval", "train"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each form (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="of the networks (default: %(default)s)")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), default="", help="mixed precision, for all networks")
    parser.add_argument("--channels-last", action="store_true", help="equivariant and timm's network channels-last")
    parser.add_argument("--compile", action="store_true", help="equivariant and timm's network compiled")
    parser.add_argument("--eager", action="store_true", help="no compiled dense forms, which take minutes to compile")
    parser.add_argument("--escnn", action="store_true", help="also the escnn network; takes minutes")
    parser.add_argument("--layers", action="store_true", help="a table of layers instead of networks")
    parser.add_argument("--draw", action="store_true", help="only draw the picture of NAME.json")
    parser.add_argument("--out", type=Path, default=BENCHMARKS)
    parser.add_argument("--name", default="networks", help="of the files written (default: %(default)s)")
    args = parser.parse_args()
    stem = args.out / args.name
    if args.draw:
        about = read(stem)
        results = about.pop("results")
        title = ", ".join(value for key, value in about.items() if key != "import")
        picture(results, title).savefig(stem.with_suffix(".png"))
        return
    os.environ.update(ALLOCATOR)  # for the processes that measure
    known = model_names()
    names = [name for pattern in args.models for name in fnmatch.filter(known, pattern)]
    if not names:
        parser.error(f"no model matches {args.models}: see --help")

    setting = Setting(args.batch_size, args.size, args.threads, args.device, args.amp, args.channels_last, args.compile)
    try:
        torch.zeros(1).to(args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    about = {
        **today("torch", "timm"),
        "machine": f"{processor()}, {threads}" if args.device == "cpu" else device_name(args.device),
        "batch": f"{args.batch_size} x 3 x {args.size} x {args.size}, {args.amp or 'float32'}",
        "ours": " ".join([*(["channels-last"] if args.channels_last else []), "compiled" if args.compile else "eager"]),
        "dense forms": "dense forms eager and compiled" if not args.eager else "dense forms eager",
    }
    title = ", ".join(about.values())
    if "create" in args.modes and not args.layers:
        seconds = import_seconds(args.repeats)
        about["import"] = f"{seconds:.3f} s of CPU time for `import equivision_timm` after `import timm`"

    if args.layers:
        layers = {
            name: in_new_process(measure_layers, name, args.batch_size, args.size, args.repeats, args.threads)
            for name in names
        }
        text = f"{title}\n" + "".join(f"\n## {name}\n{layer_table(rows)}\n" for name, rows in layers.items())
        write(stem, {**about, "layers": layers}, text)
        print(text)
        return

    results = []
    for name in (progress := tqdm(names)):
        for mode in args.modes:
            progress.set_description(f"{name} {mode}")
            dense = [] if mode == "create" or family(name) != "ResNet" else list(DENSE_FORMS[: 2 if args.eager else 4])
            if mode == "eval" and dense:
                dense += ["dense folded", "dense folded channels-last"]
            also = [*(["escnn"] if args.escnn and mode != "create" else []), "timm"]
            results.append(compare(name, mode, dense, also, args.repeats, setting))
            transformers = [result for result in results if "operations" in result]
            others = [result for result in results if "operations" not in result]
            tables = [transformer_table(transformers)] * bool(transformers) + [result_table(others)] * bool(others)
            text = "\n\n".join([title, *tables]) + "\n" + (f"\n{about['import']}\n" if "import" in about else "")
            write(stem, {**about, "results": results}, text)
    if any(result["mode"] != "create" for result in results):
        picture(results, title).savefig(stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    sys.exit(main())
