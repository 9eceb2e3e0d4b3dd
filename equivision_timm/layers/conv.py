"""Steerable convolution: learns the coefficients of a frozen kernel basis, not the pixels of a filter."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import constant_like
from equivision_timm.groups import group_order
from equivision_timm.kernel_basis import initial_std, sample_kernels
from equivision_timm.kernels import Kernel
from equivision_timm.layers.stock import is_stock, remember
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto, expand
from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.layers.strategies.context import (
    check_input,
    inference_only,
    leaves_python,
    needs_plain_operations,
)
from equivision_timm.layers.strategies.contract import finish
from equivision_timm.layers.weight_cache import WeightCache

__all__ = ["SteerableConv2d", "steerable_conv2d"]


@torch.fx.wrap  # the strategy follows from the input: one node in a graph of torch.fx
def steerable_conv2d(
    x: torch.Tensor, weight: torch.Tensor, kernel: str, stride: int = 1, dilation: int = 1, strategy: str = "auto"
) -> torch.Tensor:
    """What `SteerableConv2d` computes, as a function of the coefficients `weight` [out_fields, in_fields, n_basis, 1].

    `kernel` is the name of the kernels, `Kernel.name`; other arguments and shapes as there.

    Raises:
        ValueError: x has another shape than the coefficients take; or the strategy cannot compute this layer.
        RuntimeError: x and `weight` differ in type or device; or the strategy cannot be differentiated in this way.
    """
    layer, strategy = _choose(x, weight, kernel, stride, dilation, strategy)
    return STRATEGIES[strategy].conv2d(x.to(layer.dtype), weight, layer)


def _dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """In which type to compute; as `nn.Conv2d`, also under autocast, and which takes tensors of one device."""
    if x.device != weight.device:
        raise RuntimeError(
            f"the input is on {x.device} and the weight on {weight.device}: move one of them with .to(), or fill a "
            "model from the meta device with .to_empty() and weights"
        )
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"input type {x.dtype} and weight type {weight.dtype} should be the same: convert one of them with .to()"
        )
    return weight.dtype


def _choose(
    x: torch.Tensor, weight: torch.Tensor, kernel: str, stride: int, dilation: int, strategy: str
) -> tuple[Layer, str]:
    """The layer for the input x and the coefficients, and what `strategy` comes to there: any but 'auto'."""
    dtype, (out_fields, in_fields) = _dtype(x, weight), weight.shape[:2]
    kernels = named_kernel(kernel)
    check_input(x, in_fields, group_order(kernels.group) if kernels.input_type == "regular" else 1)
    plain = needs_plain_operations(x, weight)
    last = not plain and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    layer = Layer(kernels, in_fields, out_fields, stride, dilation, dtype, x.device, memory_format)
    if leaves_python():
        return layer, "expand"
    if plain and (strategy == "auto" or not STRATEGIES[strategy].plain_operations):
        if strategy != "auto":
            raise RuntimeError(
                f"conv_strategy {strategy!r} knows neither transforms of torch.func, nor forward-mode derivatives, nor "
                "tensors with operations of their own: use 'auto', 'block_diagonal' or 'expand'"
            )
        return layer, "expand"
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return layer, auto.choose(layer, x.shape, training) if strategy == "auto" else strategy


class SteerableConv2d(nn.Module):
    """Convolution from `in_fields` fields to `out_fields` regular fields that commutes with the group; no bias.

    Input [B, in_fields * H, height, width], H = |G| for regular, 1 for trivial input (an image); output
    [B, out_fields * |G|, height', width']; both field-major: channel = field * |G| + element. The padding is
    dilation * (kernel_size // 2): stride 1 keeps the size, stride 2 halves it, rounded up. Rotations by 90 degrees
    and reflections in the group are exact where stride 1 is used or height = width is odd; other elements up to
    resampling.
    A dilation spreads the taps of the same kernel, as in `nn.Conv2d`.

    `weight` has the shape [out_fields, in_fields, n_basis, 1]: two-dimensional and more, so that weight decay applies
    to it; the input second, so that timm can adapt it to other numbers of image channels; the last axis because a
    channels-last model takes 4-D parameters.

    The output does not depend on `strategy` but for float noise, the time does (`strategies/`). Graphs that leave
    Python (TorchScript, `torch.export`, ONNX) contain the definition, 'expand', in standard operators.

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        kernel_size: any odd number.
        group: name of the group, for example 'c8'.
        input_type: 'regular' or 'trivial'.
        stride: as in `nn.Conv2d`.
        dilation: as in `nn.Conv2d`.
        strategy: a name from `STRATEGIES`: 'expand', 'block_diagonal' or 'native' (these for regular input); or 'auto',
            the fastest by estimate.
        cutoff: up to which angular frequencies, on rings around the centre, the kernels go; see `Kernel`.
        low_pass: whether they are convolved with a binomial filter of 3 x 3 pixels, see `Kernel`.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: no such kernels, or a strategy that does not exist or cannot compute this layer here.

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
        self.stride = stride
        self.dilation = dilation
        self.padding: int = dilation * (kernel_size // 2)
        self.order: int = group_order(group)

        basis = sample_kernels(self.kernel, torch.float64, torch.device("cpu"))
        self._basis = basis  # shared by all layers; no state: what TorchScript takes along
        self.weight: nn.Parameter = nn.Parameter(torch.empty(out_fields, in_fields, len(basis), 1, **dd))
        self.check_strategy(strategy)
        self.strategy = strategy
        self.caches_by_version = False
        self._cache = WeightCache()
        self.reset_parameters()

    __jit_unused_properties__: ClassVar[list[str]] = ["group", "input_type", "kernel_size"]

    @property
    def group(self) -> str:
        """Its name."""
        return self.kernel.group

    @property
    def input_type(self) -> str:
        """'regular' or 'trivial'."""
        return self.kernel.input_type

    @property
    def kernel_size(self) -> int:
        """k, pixels along a side."""
        return self.kernel.size

    @torch.jit.unused
    def describe(self, device: torch.device, dtype: torch.dtype) -> Layer:
        """The layer, as strategies see it, computed on `device` in `dtype`."""
        return Layer(self.kernel, self.in_fields, self.out_fields, self.stride, self.dilation, dtype, device)

    @torch.jit.unused
    def check_strategy(self, strategy: str) -> None:
        """Raises ValueError where `strategy` does not exist or cannot compute this layer on this machine."""
        if strategy == "auto":
            return
        if strategy not in STRATEGIES:
            names = ", ".join(map(repr, ("auto", *STRATEGIES)))
            raise ValueError(f"unknown conv_strategy {strategy!r}: use one of {names}")
        reason = STRATEGIES[strategy].supports(self.describe(self.weight.device, self.weight.dtype))
        if reason:
            raise ValueError(f"conv_strategy {strategy!r} cannot compute this layer: {reason}. Use 'auto' or 'expand'")

    def strategy_for(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """What `strategy` comes to in inference, for an input of `shape`, on `device`, in `dtype`: any but 'auto'."""
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
        elif inference_only(x, self.weight):
            return self.infer(x)
        else:
            return self._differentiable(x)

    @torch.jit.unused
    def _differentiable(self, x: torch.Tensor) -> torch.Tensor:
        return steerable_conv2d(x, self.weight, self.kernel.name, self.stride, self.dilation, self.strategy)

    @torch.jit.unused
    def infer(
        self,
        x: torch.Tensor,
        fuse: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        sources: Sequence[torch.Tensor] = (),
        key: Hashable = None,
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """Where `inference_only`: the convolution of x with the coefficients, or with those and a bias made by `fuse`.

        What the strategy makes of the coefficients is kept from call to call on the CPU, as long as they and the
        `sources` of `fuse` hold the same values: they are compared at every call, so that no change of theirs, however
        made, meets an old filter. With `caches_by_version` it is kept on every device, and PyTorch's own count of
        changes is compared.

        Args:
            x: as for `forward`.
            fuse: weight -> (weight, bias), or None.
            sources: the tensors that `fuse` depends on.
            key: what else it depends on.
            shortcut: is added to the output, or None.
            relu: whether to end with ReLU.
        """
        layer, name = _choose(x, self.weight, self.kernel.name, self.stride, self.dilation, self.strategy)
        strategy = STRATEGIES[name]

        def pack():
            weight, bias = (self.weight, None) if fuse is None else fuse(self.weight)
            return strategy.pack(weight, bias, layer)

        if self.caches_by_version:
            packed = self._cache.get_by_version((self.weight, *sources), (strategy, layer, key), pack)
        elif layer.device.type == "cpu":
            packed = self._cache.get((self.weight, *sources), (strategy, layer, key), pack)
        else:  # to compare values would wait for the device
            packed = pack()
        x = x.to(layer.dtype)
        if shortcut is None or shortcut.dtype == layer.dtype:
            return strategy.infer(x, packed, layer, shortcut, relu)
        return finish(strategy.infer(x, packed, layer) + shortcut, None, relu)  # of the wider type of the two

    def fuse(self) -> nn.Module:
        """The plain convolution that computes the same, for deployment; called by timm's `reparameterize_model`.

        A layer that is not just this class, or has hooks, stays as it is.
        """
        return self.plain_conv(self.weight, None) if is_stock(self, SteerableConv2d) else self

    def plain_conv(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
        """The plain convolution, of the type of this layer, with the coefficients `weight` and `bias` [out_fields]."""
        with torch.no_grad():
            dtype = self.weight.dtype
            filters = expand.dense_filter(weight, self.kernel.name)
            conv = nn.Conv2d(
                filters.shape[1],
                filters.shape[0],
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                bias=bias is not None,
                device="meta",
            )
            conv.weight = nn.Parameter(filters.detach().to(dtype).contiguous())
            if bias is not None:
                conv.bias = nn.Parameter(bias.detach().to(dtype).repeat_interleave(self.order))
        return conv

    def extra_repr(self) -> str:
        return (
            f"{self.in_fields}, {self.out_fields}, kernel={self.kernel.name!r}, stride={self.stride}, "
            f"dilation={self.dilation}, strategy={self.strategy!r}"
        )


remember(SteerableConv2d)
register_notrace_module(SteerableConv2d)  # keeps its weights packed, where timm traces a model for its features
