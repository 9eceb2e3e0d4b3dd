"""Measurement of the fastest strategy for each convolution of a model on this machine.

First each distinct layer is measured by itself: every strategy that can compute it, in interleaved rounds, after its
numbers were compared with those of the definition. Then the model as a whole, with these choices, with the rule of
'auto', and with the definition: the choices count only if they win. One copy of the model is measured, whose strategies
are switched: several networks in a process disturb one another's times.
"""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from tqdm import tqdm

from equivision_timm.errors import InputError
from equivision_timm.layers import SteerableConv2d, conv_input_shapes
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto
from equivision_timm.layers.strategies.measured import layer_key, read_table, update_table
from equivision_timm.models.backbone import EquivariantBackbone

__all__ = ["Setting", "Tuning", "measure", "tune"]

LAYER_MARGIN = 0.95  # most time of a chosen strategy, relative to that of the rule's
MODEL_MARGIN = 0.98  # most time of the model with all choices, relative to the faster one of those without
ROUNDS = 7
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative


@dataclasses.dataclass(frozen=True)
class Setting:
    """Conditions of a measurement that the user chooses, as in `tune`; `size` is (height, width)."""

    batch_size: int
    size: tuple[int, int]
    amp: str = ""
    channels_last: bool = False
    train: bool = False
    compiled: bool = False

    def running(self, device: torch.device) -> contextlib.ExitStack:
        """The context of a forward pass: gradients and mixed precision."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.enable_grad() if self.train else torch.inference_mode())
        if self.amp:
            stack.enter_context(torch.autocast(device.type, getattr(torch, self.amp)))
        return stack

    def images(self, model: EquivariantBackbone) -> torch.Tensor:
        """Random images for the model."""
        parameter = next(model.parameters())
        images = torch.randn(self.batch_size, model.in_chans, *self.size, device=parameter.device)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(parameter.dtype).contiguous(memory_format=memory_format)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Result of a measurement."""

    # for each convolution the seconds of each strategy; None for a strategy whose numbers were wrong
    layers: dict[str, dict[str, float | None]]
    choice: dict[str, str]  # of each convolution: the fastest strategies if `won`, else those of the rule of 'auto'
    seconds: dict[str, float]  # of the whole model with 'choice', 'auto' and 'expand'; empty if 'choice' is 'auto'
    won: bool  # whether the choices made the model faster


def tune(
    model: EquivariantBackbone,
    size: int | tuple[int, int] = 224,
    batch_size: int = 8,
    amp: str = "",
    channels_last: bool = False,
    train: bool = False,
    compiled: bool = False,
) -> dict[str, str]:
    """Measure the fastest strategy of each convolution of `model` on this machine, and set it in the model.

    The strategies are stored in the user's cache folder, where `conv_strategy="auto"` finds them for the same layers
    and input under the same conditions (`layers/strategies/measured.py`). In a process group let one rank measure, and
    give its result to `set_conv_strategy` on the others.

    Args:
        model: on its device; only its strategies change, and not those that were given by name.
        size: of the images, side or (height, width).
        amp: type of mixed precision, 'bfloat16' or 'float16'; '' for none.
        train: measure a training step without optimizer instead of inference.
        compiled: compile the model where it is measured as a whole; the result is used by compiled models only.

    Returns:
        {name of a convolution: strategy}, as `set_conv_strategy` takes it.

    Raises:
        InputError: no layer has the strategy 'auto'.
    """
    setting = Setting(batch_size, (size, size) if isinstance(size, int) else size, amp, channels_last, train, compiled)
    choice = measure(model, setting).choice
    model.set_conv_strategy(choice)
    return choice


def measure(model: EquivariantBackbone, setting: Setting) -> Tuning:
    """Measure all layers, then the model. The time of each layer is stored as soon as it is known."""
    model = copy.deepcopy(model).train(setting.train)
    model = model.to(memory_format=torch.channels_last) if setting.channels_last else model
    device = next(model.parameters()).device
    found = _inputs(model, setting)
    rule = {name: auto.rule(layer) for name, (layer, _) in found.items()}
    layers = _measure_layers(model, found, setting)
    fastest = {name: _fastest(layers[name], rule[name]) for name in found}
    seconds: dict[str, float] = {}
    if fastest != rule:
        forms = {"choice": fastest, "auto": rule, "expand": dict.fromkeys(fastest, "expand")}
        seconds = _measure_model(model, forms, setting)
    won = bool(seconds) and seconds["choice"] < MODEL_MARGIN * min(seconds["auto"], seconds["expand"])
    keys = {layer_key(*found[name], setting.train, setting.compiled): fastest[name] for name in found}
    update_table(device, "models", _model_key(model, setting), {"won": won, "seconds": seconds, "choice": keys})
    auto.decide.cache_clear()
    return Tuning(layers, fastest if won else rule, seconds, won)


def _model_key(model: EquivariantBackbone, setting: Setting) -> str:
    """The name of a tuned model in the table."""
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    mode, compiled = "train" if setting.train else "eval", ", compiled" if setting.compiled else ""
    height, width = setting.size
    return f"{name}, {setting.batch_size}x{height}x{width}, {setting.amp or 'float32'}, {mode}{compiled}"


def _inputs(model: EquivariantBackbone, setting: Setting) -> dict[str, tuple[Layer, tuple]]:
    """For each convolution of regular fields with the strategy 'auto': the layer and the shape of its input."""
    images = setting.images(model)
    dtype = getattr(torch, setting.amp) if setting.amp else images.dtype
    last = images.device.type == "cpu" or setting.channels_last
    memory_format = torch.channels_last if last else torch.contiguous_format
    found: dict[str, tuple[Layer, tuple]] = {}
    for name, shape in conv_input_shapes(model, images[:1]).items():
        conv = _conv(model, name)
        if conv.strategy == "auto" and conv.input_type == "regular":
            layer = dataclasses.replace(conv.describe(images.device, dtype), memory_format=memory_format)
            found[name] = layer, (setting.batch_size, *shape[1:])
    if not found:
        raise InputError("no convolution of this model has the strategy 'auto': there is nothing to choose")
    return found


def _conv(model: EquivariantBackbone, name: str) -> SteerableConv2d:
    return cast(SteerableConv2d, model.get_submodule(name))


def _measure_layers(
    model: EquivariantBackbone, found: dict[str, tuple[Layer, tuple]], setting: Setting
) -> dict[str, dict[str, float | None]]:
    """Seconds of each strategy, by layer, from the table or measured."""
    known = read_table(next(model.parameters()).device)["layers"]
    for name, (layer, shape) in tqdm(found.items(), desc="layers", unit="layer"):
        key = layer_key(layer, shape, setting.train)
        candidates = [s for s, strategy in STRATEGIES.items() if strategy.supports(layer) is None]
        if key not in known or known[key].keys() != set(candidates):
            known[key] = _measure_layer(_conv(model, name), layer, shape, candidates, setting)
            update_table(layer.device, "layers", key, known[key])
    return {name: known[layer_key(layer, shape, setting.train)] for name, (layer, shape) in found.items()}


def _measure_layer(
    conv: SteerableConv2d, layer: Layer, shape: tuple, candidates: list[str], setting: Setting
) -> dict[str, float | None]:
    x = torch.randn(shape, device=layer.device, dtype=conv.weight.dtype)
    x = x.contiguous(memory_format=layer.memory_format).requires_grad_(setting.train)

    def run(name: str) -> list[torch.Tensor]:
        conv.strategy = name
        with setting.running(layer.device):
            y = conv(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x, conv.weight])] if setting.train else [y]

    expected = run("expand")
    correct = [name for name in candidates if _agree(run(name), expected, TOLERANCE[layer.dtype])]
    seconds = _interleaved({name: partial(run, name) for name in correct}, layer.device)
    conv.strategy = "auto"
    return {name: seconds.get(name) for name in candidates}


def _agree(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> bool:
    """Whether all are equal up to `tolerance`, relative to the largest entry; NaN is not."""
    return all(((a - b).abs().max() <= tolerance * b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def _fastest(row: dict[str, float | None], rule: str) -> str:
    """The strategy with the least time, if it wins by the margin against that of the rule."""
    times = {name: seconds for name, seconds in row.items() if seconds}
    best = min(times, key=times.__getitem__)
    return best if rule not in times or times[best] <= LAYER_MARGIN * times[rule] else rule


def _measure_model(model: EquivariantBackbone, forms: dict[str, dict[str, str]], setting: Setting) -> dict[str, float]:
    """Seconds of the model with each of the mappings `forms`."""
    images = setting.images(model)
    function = torch.compile(model) if setting.compiled else model

    def run(strategies: dict[str, str]) -> None:
        model.set_conv_strategy(strategies)
        with setting.running(images.device):
            y = function(images)
        if setting.train:
            y.float().sum().backward()

    return _interleaved({name: partial(run, strategies) for name, strategies in forms.items()}, images.device)


def _interleaved(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each of `runs`, taken in turns; the first round, in which code is compiled, does not count."""
    rounds = [{name: _seconds(run, device) for name, run in runs.items()} for _ in range(ROUNDS + 1)]
    return {name: statistics.median(seconds[name] for seconds in rounds[1:]) for name in runs}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    clock = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - clock
