"""Steerable convolution: learns the coefficients of a fixed kernel basis instead of the pixels of a filter."""

import copy
import math
from functools import lru_cache, partial
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import constant_like
from equivision_timm.errors import check_choice
from equivision_timm.kernel_basis import initial_std, sample_kernels
from equivision_timm.kernels import Kernel
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto, expand
from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.torch_state import has_sizes, is_watched, leaves_python, needs_plain_operations

__all__ = ["SteerableConv2d", "conv_input_shapes", "is_watched", "steerable_conv2d"]


@torch.fx.wrap  # the strategy follows from the input: one node in a graph of torch.fx
def steerable_conv2d(
    x: torch.Tensor, weight: torch.Tensor, kernel: str, stride: int = 1, dilation: int = 1, strategy: str = "auto"
) -> torch.Tensor:
    """`SteerableConv2d` as a function of the coefficients `weight` [out_fields, in_fields, n_basis, 1].

    `kernel` is the name of the kernels, `Kernel.name`; other arguments and shapes as there.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype or x.device != weight.device:  # nothing below would notice
        raise RuntimeError(
            f"the input ({x.dtype}, {x.device}) and the weight ({weight.dtype}, {weight.device}) should be the same in "
            "type and device: convert one of them with .to()"
        )
    plain, exported = needs_plain_operations(x, weight), leaves_python()
    last = not plain and not exported and (x.device.type == "cpu" or x.is_contiguous(memory_format=torch.channels_last))
    memory_format = torch.channels_last if last else torch.contiguous_format
    description = kernel, weight.shape[1], weight.shape[0], stride, dilation, x.dtype, x.device, memory_format
    layer = (_describe if torch.compiler.is_compiling() else _cached_description)(*description)
    if has_sizes(x) and (x.ndim != 4 or x.shape[1] != layer.in_channels or x.shape[2] == 0 or x.shape[3] == 0):
        raise ValueError(
            f"a convolution of {layer.in_fields} fields takes [B, {layer.in_channels}, H, W], at least 1 x 1 pixels, "
            f"but got {list(x.shape)}"
        )
    if exported or (plain and strategy == "auto"):
        strategy = "expand"
    elif strategy == "auto":
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        strategy = auto.choose(layer, x.shape, training)
    elif plain and not STRATEGIES[strategy].plain_operations:
        raise RuntimeError(
            f"conv_strategy {strategy!r} supports neither transforms of torch.func, nor forward-mode derivatives, nor "
            "tensors with operations of their own: use 'auto', 'block_diagonal' or 'expand'"
        )
    return STRATEGIES[strategy].conv2d(x, weight, layer)


def _describe(kernel: str, *fields: Any) -> Layer:
    return Layer(named_kernel(kernel), *fields)


_cached_description = lru_cache(maxsize=4096)(_describe)


class SteerableConv2d(nn.Module):
    """Convolution from `in_fields` fields to `out_fields` regular fields that commutes with the group; no bias.

    Input [B, in_fields * H, height, width], H = |G| for regular, 1 for trivial input (an image); output
    [B, out_fields * |G|, height', width']; both field-major: channel = field * |G| + element. The padding is
    dilation * (kernel_size // 2): stride 1 keeps the size, stride 2 halves it, rounded up. Rotations by 90 degrees
    and reflections in the group are exact where stride 1 is used or height = width is odd; other elements up to
    resampling.

    `weight` has the shape [out_fields, in_fields, n_basis, 1]: two-dimensional and more, so that weight decay applies
    to it; the input second, so that timm can adapt it to other numbers of image channels; the last axis because a
    channels-last model takes 4-D parameters.

    The output does not depend on `strategy` but for float noise, the time does (`strategies/`). Graphs that leave
    Python (TorchScript, `torch.export`, ONNX) contain the definition, 'expand', in standard operators.

    Arguments that are not listed are those of `Kernel` and of `nn.Conv2d`.

    Args:
        strategy: a name from `STRATEGIES`: 'expand', 'block_diagonal' or 'native' (these for regular input); or 'auto',
            the fastest as measured by `tune`, or by a rule (`strategies/auto.py`).

    Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019).
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        kernel_size: int,
        group: str,
        input_type: str = "regular",
        stride: int = 1,
        dilation: int = 1,
        strategy: str = "auto",
        cutoff: int | None = None,
        low_pass: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.kernel: Kernel = Kernel(group, kernel_size, input_type, cutoff, low_pass)
        self.group = group
        self.input_type = input_type
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.padding: int = dilation * (kernel_size // 2)
        self.order: int = self.kernel.order

        basis = sample_kernels(self.kernel, torch.float64, torch.device("cpu"))
        self._basis = basis  # shared by all layers; no state: what TorchScript takes along
        self.weight: nn.Parameter = nn.Parameter(torch.empty(out_fields, in_fields, len(basis), 1, **dd))
        self.check_strategy(strategy)
        self.strategy = strategy
        self.reset_parameters()

    @torch.jit.unused
    def describe(self, device: torch.device, dtype: torch.dtype) -> Layer:
        """The layer as strategies see it, on `device` in `dtype`."""
        return Layer(self.kernel, self.in_fields, self.out_fields, self.stride, self.dilation, dtype, device)

    @torch.jit.unused
    def check_strategy(self, strategy: str) -> None:
        """Raises ValueError if `strategy` does not exist or cannot compute this layer on this machine."""
        check_choice("conv_strategy", strategy, ("auto", *STRATEGIES))
        if strategy == "auto":
            return
        reason = STRATEGIES[strategy].supports(self.describe(self.weight.device, self.weight.dtype))
        if reason:
            raise ValueError(f"conv_strategy {strategy!r} cannot compute this layer: {reason}. Use 'auto' or 'expand'")

    def strategy_for(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """The strategy that inference takes for an input of `shape`, on `device`, in `dtype`; not 'auto'."""
        return auto.choose(self.describe(device, dtype), shape, False) if self.strategy == "auto" else self.strategy

    def reset_parameters(self) -> None:
        """Draw the coefficients, w_b ~ N(0, he_std_b^2 / in_fields)."""
        std = constant_like(self.weight, initial_std, self.kernel)
        with torch.no_grad():
            self.weight.normal_().mul_(std[:, None] / math.sqrt(self.in_fields))  # std over the axis of the basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            filters = expand.expand_filter(self.weight, self._basis.to(self.weight))
            return F.conv2d(x, filters, None, self.stride, self.padding, self.dilation)
        return steerable_conv2d(x, self.weight, self.kernel.name, self.stride, self.dilation, self.strategy)

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The plain convolution that computes the same, or itself if watched; for timm's `reparameterize_model`."""
        return self if is_watched(self) else self.dense_conv(self.weight, None)

    @torch.no_grad()
    def dense_conv(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
        """The plain convolution with constant coefficients `weight` [O, I, n_basis, 1] and `bias` [O] or None."""
        filters = expand.dense_filter(weight, self.kernel.name).to(self.weight.dtype)
        bias = None if bias is None else bias.to(filters).repeat_interleave(self.order)
        conv = constant_conv(filters, bias, stride=self.stride, padding=self.padding, dilation=self.dilation)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.in_fields}, {self.out_fields}, kernel={self.kernel.name!r}, stride={self.stride}, "
            f"dilation={self.dilation}, strategy={self.strategy!r}"
        )


register_notrace_module(SteerableConv2d)  # one node where timm traces a model, which TorchScript can compile


def constant_conv(weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1, **steps: int) -> nn.Conv2d:
    """The plain convolution with these constant filters [out, in / groups, k, k]; `steps`: its stride and so on."""
    out_channels, channels, *kernel = weight.shape
    shape: Any = (channels * groups, out_channels, kernel)
    conv = nn.Conv2d(*shape, groups=groups, bias=bias is not None, **steps, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


@torch.no_grad()
def conv_input_shapes(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Size]:
    """{name: shape of the input} of each `SteerableConv2d` of `model` in eval mode; `model` is not changed."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str, _: nn.Module, args: tuple[torch.Tensor]) -> None:
        shapes[name] = args[0].shape

    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, SteerableConv2d):
            module.register_forward_pre_hook(partial(note, name))
    model(image)
    return shapes
