"""Measure which strategy computes each convolution of a model fastest on this machine.

First each distinct layer alone: every strategy that can compute it, in turns, after its numbers were compared with
those of the definition. Then the model as a whole, with these choices, with those that 'auto' estimates, and with the
definition throughout, in turns: the choices count only if they win. So tuning never makes a model slower, for this
input on this machine. The three are one model whose strategies are switched, since networks that share a process, each
with memory of its own, disturb one another's times.
"""

import argparse
import contextlib
import copy
import difflib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg
from tqdm import tqdm

from equivision_timm.cli.models import find_device
from equivision_timm.cli.options import Parsers, add_batches, integer
from equivision_timm.errors import InputError, check_number
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto
from equivision_timm.layers.strategies.measured import layer_key, read_table, table_file, update_table
from equivision_timm.models import EquivariantBackbone, model_names

__all__ = ["Setting", "Tuning", "as_table", "measure", "register", "run", "tune"]

LAYER_MARGIN = 0.95  # a strategy must take at most so much of the time of the one that 'auto' estimates
MODEL_MARGIN = 0.98  # the model with all choices, of the faster one of those without
ROUNDS = 7  # timed ones; two more warm up
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative


@dataclass(frozen=True)
class Setting:
    """What the times are for.

    Attributes:
        batch_size: number of images.
        size: of the images, (height, width).
        amp: type of autocast, 'bfloat16' or 'float16'; '' for none.
        channels_last: memory format of images and model.
        train: forward and backward in training mode, or inference.
        compiled: whether the whole model is compiled.
    """

    batch_size: int
    size: tuple[int, int]
    amp: str = ""
    channels_last: bool = False
    train: bool = False
    compiled: bool = False

    def running(self, device: torch.device) -> contextlib.ExitStack:
        """Gradients or none, mixed precision or none."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.enable_grad() if self.train else torch.inference_mode())
        if self.amp:
            stack.enter_context(torch.autocast(device.type, getattr(torch, self.amp)))
        return stack


@dataclass(frozen=True)
class Tuning:
    """What came out.

    Attributes:
        layers: for each convolution the seconds of each strategy, and None where a strategy gave wrong numbers.
        choice: the strategy of each convolution, as `conv_strategy=` takes it: the fastest where `won`, else those
            that 'auto' estimates.
        seconds: of the whole model: 'choice', 'auto' and 'expand'; empty where the choice is that of 'auto'.
        won: whether the choices made the model faster.
    """

    layers: dict[str, dict[str, float | None]]
    choice: dict[str, str]
    seconds: dict[str, float]
    won: bool


def tune(
    model: EquivariantBackbone,
    size: int | tuple[int, int] = 224,
    batch_size: int = 8,
    amp: str = "",
    channels_last: bool = False,
    train: bool = False,
    compiled: bool = False,
) -> dict[str, str]:
    """The fastest strategy of each convolution of `model` here, measured; the model uses them from now on.

    They are kept in the user's cache folder, where `conv_strategy="auto"` finds them, for the same layers with the same
    input under the same conditions (`layers/strategies/measured.py`). In a process group the first rank measures,
    and all take its choices.

    Args:
        model: on its device; its weights and mode do not change. Convolutions whose strategy was given by name keep it.
        size: of the images, n or (height, width).
        batch_size: number of images.
        amp: type of mixed precision, 'bfloat16' or 'float16'; '' for none.
        channels_last: whether `model` and its images lie so.
        train: measure a training step without optimizer, not inference.
        compiled: compile the whole model where it is measured; the choices are for compiled models alone.

    Returns:
        {name of a convolution: strategy}, what `set_conv_strategy` takes.

    Raises:
        InputError: no memory for the batch; the model takes no such images; no convolution is left to choose for.
    """
    sides = (size, size) if isinstance(size, int) else size
    setting = Setting(batch_size, sides, amp, channels_last, train, compiled)
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    choice = _measure_on_first_rank(model, setting) if group else measure(model, setting).choice
    model.set_conv_strategy(choice)
    return choice


def _measure_on_first_rank(model: EquivariantBackbone, setting: Setting) -> dict[str, str]:
    """The choice of the first rank, or its error, on all ranks, which wait for it."""
    result: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            result = [measure(model, setting).choice]
        except Exception as error:
            result = [error]
    torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def measure(model: EquivariantBackbone, setting: Setting) -> Tuning:
    """Measure all layers, then the model; see `tune`. Each layer is kept in the table as soon as it was measured."""
    check_number("--batch-size", setting.batch_size, 1, 1 << 20)
    device = next(model.parameters()).device
    before = {name: layer.strategy for name, layer in _layers(model).items()}
    was_training, gradients = model.training, [p.grad for p in model.parameters()]
    model = model.train(setting.train)
    model.zero_grad(set_to_none=True)  # the caller's gradients are put back, and not added to
    statistics_before = [buffer.clone() for buffer in model.buffers()]
    try:
        found = _inputs(model, setting, device)
        if not found:
            raise InputError("no convolution of this model has the strategy 'auto': there is nothing to choose")
        estimates = {name: auto.estimated(layer, shape) for name, (layer, shape) in found.items()}
        layers = _measure_layers(model, found, setting, device)
        fastest = {name: _fastest(layers[name], estimates[name]) for name in found}
        seconds: dict[str, float] = {}
        if fastest != estimates:
            forms = {"choice": fastest, "auto": estimates, "expand": dict.fromkeys(fastest, "expand")}
            seconds = _measure_model(model, forms, setting, device)
        won = bool(seconds) and seconds["choice"] < MODEL_MARGIN * min(seconds["auto"], seconds["expand"])
        choice = fastest if won else estimates
        mode = (setting.train, setting.compiled)
        keys = {layer_key(*found[name], *mode): strategy for name, strategy in fastest.items()}
        update_table(device, "models", _model_key(model, setting), {"won": won, "seconds": seconds, "choice": keys})
        return Tuning(layers, choice, seconds, won)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"no memory for --batch-size {setting.batch_size}: lower it, or --size") from error
    finally:
        model.set_conv_strategy(before)
        model.train(was_training)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), statistics_before, strict=True):
                buffer.copy_(value)


def as_table(tuning: Tuning) -> str:
    """For people: a line for each convolution, the verdict, and how to use it."""
    names = sorted({name for row in tuning.layers.values() for name in row})
    width = max(map(len, tuning.layers))
    lines = [f"{'layer':{width}}  {'  '.join(f'{name:>15}' for name in names)}  choice"]
    for layer, row in tuning.layers.items():
        least = min(value for value in row.values() if value is not None)
        cells = [_cell(row.get(name), least) if name in row else "-" for name in names]
        lines.append(f"{layer:{width}}  {'  '.join(f'{cell:>15}' for cell in cells)}  {tuning.choice[layer]}")
    if not tuning.seconds:
        lines.append("\nThe estimates of 'auto' are the fastest here: there is nothing to change.")
        return "\n".join(lines)
    ratios = {name: tuning.seconds[name] / tuning.seconds["choice"] for name in ("auto", "expand")}
    verdict = f"auto takes {ratios['auto']:.2f} times, expand {ratios['expand']:.2f} times the time of these choices"
    lines.append(f"\nThe whole model: {verdict}.")
    if tuning.won:
        lines.append("They win. As a mapping for conv_strategy=:")
        lines.append(json.dumps(tuning.choice))
    else:
        lines.append("That is too little: 'auto' stays as it is.")
    return "\n".join(lines)


def _cell(seconds: float | None, least: float) -> str:
    return "wrong numbers" if seconds is None else f"{1e3 * seconds:.2f} ms ({seconds / least:.2f})"


def _layers(model: nn.Module) -> dict[str, SteerableConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SteerableConv2d)}


def _model_key(model: EquivariantBackbone, setting: Setting) -> str:
    """The name of a tuned model in the table; the layers' own keys say what their times depend on."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    mode, amp = "train" if setting.train else "eval", setting.amp or "float32"
    compiled = ", compiled" if setting.compiled else ""
    return f"{name}, {setting.batch_size}x{setting.size[0]}x{setting.size[1]}, {amp}, {mode}{compiled}"


def _images(model: EquivariantBackbone, setting: Setting, device: torch.device) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    images = torch.randn(setting.batch_size, model.in_chans, *setting.size, device=device, dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last) if setting.channels_last else images


def _inputs(model: EquivariantBackbone, setting: Setting, device: torch.device) -> dict[str, tuple[Layer, tuple]]:
    """For each convolution of regular fields that 'auto' chooses for: the layer and the shape of its input."""
    found: dict[str, tuple[Layer, tuple]] = {}

    def see(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, SteerableConv2d)
        (x,) = args
        dtype = getattr(torch, setting.amp) if setting.amp else x.dtype
        last = x.is_contiguous(memory_format=torch.channels_last)
        layer = Layer(
            *(module.kernel, module.in_fields, module.out_fields, module.stride, module.dilation, dtype, x.device),
            torch.channels_last if last else torch.contiguous_format,
        )
        found[name] = (layer, tuple(x.shape))

    hooks = [
        module.register_forward_pre_hook(partial(see, name))
        for name, module in _layers(model).items()
        if module.strategy == "auto" and module.input_type == "regular"
    ]
    try:
        with setting.running(device), torch.no_grad():
            model(_images(model, setting, device))
    except (ValueError, AssertionError) as error:
        raise InputError(str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _measure_layers(
    model: EquivariantBackbone, found: dict[str, tuple[Layer, tuple]], setting: Setting, device: torch.device
) -> dict[str, dict[str, float | None]]:
    """Seconds of each strategy, by layer; those that the table has are not measured again."""
    known = read_table(device)["layers"]
    rows: dict[str, dict[str, float | None]] = {}
    for name, (layer, shape) in tqdm(found.items(), desc="layers", unit="layer"):
        key = layer_key(layer, shape, setting.train)
        candidates = [s for s, strategy in STRATEGIES.items() if strategy.supports(layer) is None]
        if key not in known or known[key].keys() != set(candidates):
            known[key] = _measure_layer(model.get_submodule(name), layer, shape, candidates, setting, device)
            update_table(device, "layers", key, known[key])
        rows[name] = known[key]
    return rows


def _measure_layer(
    module: nn.Module, layer: Layer, shape: tuple, candidates: list[str], setting: Setting, device: torch.device
) -> dict[str, float | None]:
    dtype = next(module.parameters()).dtype
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layer.memory_format)
    modules = {}
    for name in candidates:
        modules[name] = copy.deepcopy(module)
        modules[name].strategy = name

    def run(name: str) -> list[torch.Tensor]:
        own = x.detach().requires_grad_(setting.train)
        with setting.running(device):
            y = modules[name](own)
        if not setting.train:
            return [y]
        weight = modules[name].weight
        return [y.detach(), *torch.autograd.grad(y.sum(), [own, weight])]

    expected = run("expand")
    right = [name for name in candidates if _agree(run(name), expected, TOLERANCE[layer.dtype])]
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for repeat in range(ROUNDS + 2):
        for name in right:
            taken = _seconds(lambda name=name: run(name), device)
            if repeat > 1:
                seconds[name].append(taken)
    return {name: statistics.median(seconds[name]) if name in right else None for name in candidates}


def _agree(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> bool:
    """Whether all are equal up to `tolerance`, relative to the largest entry; NaN is not."""
    return all(((a - b).abs().max() <= tolerance * b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def _fastest(row: dict[str, float | None], estimate: str) -> str:
    """The strategy with the least time, if it wins by the margin over the one that would run otherwise."""
    times = {name: seconds for name, seconds in row.items() if seconds is not None}
    best = min(times, key=times.__getitem__)
    if estimate not in times:  # its numbers were wrong
        return best
    return best if times[best] <= LAYER_MARGIN * times[estimate] else estimate


def _measure_model(
    model: EquivariantBackbone, forms: dict[str, dict[str, str]], setting: Setting, device: torch.device
) -> dict[str, float]:
    """Median seconds of the model with each of the mappings `forms`."""
    images = _images(model, setting, device)
    function = torch.compile(model) if setting.compiled else model

    def run() -> None:
        with setting.running(device):
            y = function(images)
        if setting.train:
            y.float().sum().backward()

    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in tqdm(range(ROUNDS + 1), desc="model", unit="round"):
        for name, strategies in forms.items():
            model.set_conv_strategy(strategies)
            run()  # filters are made, code is compiled
            taken = _seconds(run, device)
            if repeat:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes: by the clock, and on a GPU by its events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # milliseconds
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


def run(name: str, size: int | None, device: str | None, **options: Any) -> None:
    """Tune a model of this package, and print what came out: the command `tune`.

    Args:
        name: of the model.
        size: side of the images; None for the exact size of at least 224 pixels, or the model's own if that is smaller.
        device: where to measure; None for the GPU if there is one.
        options: as for `Setting`.

    Raises:
        InputError: no such model or device, a size that the model does not take, no memory.
    """
    if name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=1)
        raise InputError(f"{name!r} is no model of this package{f', did you mean {near[0]!r}?' if near else ''}")
    place = find_device(device)
    model = timm.create_model(name).to(place)
    if options["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    if not isinstance(model, EquivariantBackbone):
        raise InputError(f"{name!r} has no steerable convolutions to choose strategies for: use a ResNet")
    cfg = get_pretrained_cfg(name)
    side = size or model.exact_sizes(near=min(224, cfg.input_size[-1]) if cfg else 224)[1]
    print(as_table(measure(model, Setting(size=(side, side), **options))))
    print(f"Measured with {options['batch_size']} images of {side} x {side} pixels; kept in {table_file(place)}")


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which strategy of convolution is fastest here, layer by layer",
        description="Measures each convolution of a model by every conv_strategy, then the model as a whole. Choices "
        "that win are stored in the user's cache folder, where conv_strategy='auto', the default, finds them for the "
        "same layers and input. The same command continues an interrupted one.",
    )
    add = parser.add_argument
    add("name", metavar="MODEL", help="model of this package, e.g. c8resnet50")
    add("--size", type=integer(1, 8192), metavar="N", help="image size (default: the exact size near 224)")
    add_batches(parser, 8)
    add("--amp", choices=("bfloat16", "float16"), default="", help="mixed precision (default: none)")
    add("--channels-last", action="store_true", help="memory format")
    add("--train", action="store_true", help="forward and backward (default: inference)")
    add("--compile", dest="compiled", action="store_true", help="compile the model where it is measured as a whole")
    stored = "the layers measured so far are stored, the same command continues from there"
    parser.set_defaults(run=_run, interrupted=stored)


def _run(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("batch_size", "amp", "channels_last", "train", "compiled")}
    run(args.name, args.size, args.device, **options)
    return 0
