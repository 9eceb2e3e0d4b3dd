"""Steerable convolution: learns the coefficients of a frozen kernel basis, not the pixels of a filter."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import fitting
from equivision_timm.groups import group_order
from equivision_timm.kernel_bases import Kernel, initial_std, sample_kernels
from equivision_timm.layers.conv_strategies import STRATEGIES, auto, block_diagonal, expand, native, native_library
from equivision_timm.layers.conv_strategies.context import (
    check_input,
    inference_only,
    leaves_python,
    needs_plain_operations,
)
from equivision_timm.layers.conv_strategies.irreps import block_weights
from equivision_timm.layers.stock import is_stock, remember

__all__ = ["SteerableConv2d", "steerable_conv2d"]

_CODE = {"expand": expand, "block_diagonal": block_diagonal, "native": native}


@torch.fx.wrap  # the strategy follows from the input: one node in a graph of torch.fx
def steerable_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: str,
    kernel_size: int,
    input_type: str = "regular",
    stride: int = 1,
    dilation: int = 1,
    strategy: str = "auto",
) -> torch.Tensor:
    """What `SteerableConv2d` computes, as a function of the coefficients `weight` [out_fields, in_fields, n_basis, 1].

    Other arguments and shapes as there.

    Raises:
        ValueError: x has another shape than the coefficients take.
        RuntimeError: x and `weight` differ in type; or the strategy cannot be differentiated in this way.
    """
    dtype = _dtype(x, weight)
    x, strategy = x.to(dtype), _choose(x, weight, dtype, group, kernel_size, input_type, stride, strategy)
    weights = _weights(strategy, weight, group, kernel_size, input_type).to(dtype)
    return _CODE[strategy].conv2d(x, weights, None, group, kernel_size, stride, dilation)


def _dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """In which type to compute; as `nn.Conv2d`, also under autocast."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise RuntimeError(
            f"input type {x.dtype} and weight type {weight.dtype} should be the same: convert one of them with .to()"
        )
    return weight.dtype


def _choose(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    group: str,
    kernel_size: int,
    input_type: str,
    stride: int,
    strategy: str,
) -> str:
    """What `strategy` comes to for the input x and the coefficients: any but 'auto'."""
    check_input(x, weight.shape[1], group_order(group) if input_type == "regular" else 1)
    if leaves_python():
        return "expand"
    if needs_plain_operations(x, weight) and strategy != "expand":
        if strategy != "auto":
            raise RuntimeError(
                f"conv_strategy {strategy!r} knows neither transforms of torch.func, nor forward-mode derivatives, nor "
                "tensors with operations of their own: use 'auto' or 'expand'"
            )
        return "expand"
    if strategy != "auto":
        return strategy
    if input_type != "regular":
        return "expand"
    out_fields, in_fields = weight.shape[:2]
    return auto.choose(x.shape, x.device, dtype, in_fields, out_fields, kernel_size, stride, group)


def _weights(strategy: str, weight: torch.Tensor, group: str, kernel_size: int, input_type: str) -> torch.Tensor:
    """The dense filter or the block weights, in the type of `weight`."""
    if strategy == "expand":
        return expand.dense_filter(weight, group, kernel_size, input_type)
    return block_weights(weight, group, kernel_size)


@register_notrace_module  # keeps its weights packed, where timm traces a model for its features
class SteerableConv2d(nn.Module):
    """Convolution from `in_fields` fields to `out_fields` regular fields that commutes with the group; no bias.

    Input [B, in_fields * H, height, width], H = |G| for regular, 1 for trivial input (an image); output
    [B, out_fields * |G|, height', width']; both field-major: channel = field * |G| + element. The padding is
    dilation * (kernel_size // 2): stride 1 keeps the size, stride 2 halves it, rounded up. Turns by 90 degrees and
    mirrors of the group are exact where stride 1 is used or height = width is odd; other elements up to resampling.
    A dilation spreads the taps of the same kernel, as in `nn.Conv2d`.

    `weight` has the shape [out_fields, in_fields, n_basis, 1]: two-dimensional and more, so that weight decay applies
    to it; the input second, so that timm can adapt it to other numbers of image channels; the last axis because a
    channels-last model takes 4-D parameters.

    The output does not depend on `strategy` but for float noise, the time does (`conv_strategies/`). Graphs that leave
    Python (TorchScript, `torch.export`, ONNX) contain the definition, 'expand', in standard operators.

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        kernel_size: 1 or 3, or 7 for trivial input: the sizes for which bases are frozen.
        group: name of the group, for example 'c8'.
        input_type: 'regular' or 'trivial'.
        stride: as in `nn.Conv2d`.
        dilation: as in `nn.Conv2d`.
        strategy: 'expand', 'block_diagonal' or 'native' (both for regular input), or 'auto', the fastest by estimate.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: unknown group, no basis frozen for this kernel size and input type, or a strategy that does not
            exist or cannot run here.

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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.kernel_size = kernel_size
        self.group = group
        self.input_type = input_type
        self.stride = stride
        self.dilation = dilation
        self.padding = dilation * (kernel_size // 2)
        self.order = group_order(group)

        basis = sample_kernels(Kernel(group, kernel_size, input_type), torch.float64, torch.device("cpu"))
        self._basis = basis  # shared by all layers; no state: what TorchScript takes along
        self.weight = nn.Parameter(torch.empty(out_fields, in_fields, len(basis), 1, **dd))
        self.check_strategy(strategy)
        self.strategy = strategy
        self._packed = _Packed()
        self.reset_parameters()

    def check_strategy(self, strategy: str) -> None:
        """Raises ValueError where `strategy` does not exist or cannot run: on trivial input, or on this machine."""
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown conv_strategy {strategy!r}: use one of {', '.join(map(repr, STRATEGIES))}")
        if strategy in ("block_diagonal", "native") and self.input_type != "regular":
            raise ValueError(
                f"conv_strategy {strategy!r} needs regular fields, but the input of this layer is {self.input_type}: "
                "use 'expand' or 'auto'"
            )
        if strategy == "native":
            try:
                native_library.library(torch.float32)
            except RuntimeError as error:
                raise ValueError(str(error)) from error

    def strategy_for(
        self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> str:
        """What `strategy` comes to for an input of `shape`, on `device`, computed in `dtype`: any but 'auto'."""
        if self.strategy != "auto":
            return self.strategy
        if self.input_type != "regular":
            return "expand"
        fields = self.in_fields, self.out_fields
        return auto.choose(shape, device, dtype, *fields, self.kernel_size, self.stride, self.group)

    def reset_parameters(self) -> None:
        """Draw the coefficients, w_b ~ N(0, he_std_b^2 / in_fields)."""
        kernel = Kernel(self.group, self.kernel_size, self.input_type)
        std = fitting(initial_std(kernel, self.weight.dtype, self.weight.device), self.weight)
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
        return steerable_conv2d(
            x,
            self.weight,
            self.group,
            self.kernel_size,
            self.input_type,
            self.stride,
            self.dilation,
            self.strategy,
        )

    @torch.jit.unused
    def infer(
        self,
        x: torch.Tensor,
        fuse: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        sources: Sequence[torch.Tensor] = (),
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """Where `inference_only`: the convolution of x with the coefficients, or with those and a bias made by `fuse`.

        What the strategy makes of the coefficients is kept from call to call on the CPU, as long as they and the
        `sources` of `fuse` hold the same values: they are compared at every call, so that no change of theirs, however
        made, meets an old filter.

        Args:
            x: as for `forward`.
            fuse: weight -> (weight, bias), or None.
            sources: what `fuse` depends on.
            shortcut: is added to the output, or None.
            relu: whether to end with ReLU.
        """
        weight, dtype = self.weight, _dtype(x, self.weight)
        strategy = _choose(x, weight, dtype, self.group, self.kernel_size, self.input_type, self.stride, self.strategy)
        code = _CODE[strategy]

        def pack():
            used, bias = (weight, None) if fuse is None else fuse(weight)
            weights = _weights(strategy, used, self.group, self.kernel_size, self.input_type).to(dtype)
            return code.pack(weights, bias if bias is None else bias.to(dtype), self.group, self.kernel_size)

        on_cpu = x.device.type == "cpu"  # elsewhere to compare values would wait for the device
        packed = self._packed.get((weight, *sources), (strategy, dtype), pack) if on_cpu else pack()
        x, layer = x.to(dtype), (self.group, self.kernel_size, self.stride, self.dilation)
        if shortcut is None or shortcut.dtype == dtype:
            return code.infer(x, packed, *layer, shortcut, relu)
        y = code.infer(x, packed, *layer) + shortcut  # of the wider type of the two
        return F.relu(y, inplace=True) if relu else y

    def fuse(self) -> nn.Module:
        """The plain convolution that computes the same, for deployment; called by timm's `reparameterize_model`.

        A layer that is not just this class, or has hooks, stays as it is.
        """
        return self.plain_conv(self.weight, None) if is_stock(self, SteerableConv2d) else self

    def plain_conv(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
        """The plain convolution, of the type of this layer, with the coefficients `weight` and `bias` [out_fields]."""
        with torch.no_grad():
            dtype = self.weight.dtype
            filters = expand.dense_filter(weight, self.group, self.kernel_size, self.input_type)
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
            f"{self.in_fields}, {self.out_fields}, kernel_size={self.kernel_size}, group={self.group!r}, "
            f"input_type={self.input_type!r}, stride={self.stride}, dilation={self.dilation}, "
            f"strategy={self.strategy!r}"
        )


remember(SteerableConv2d)


class _Packed:
    """The last value made of some tensors, and copies of them to compare with. Neither copied nor saved."""

    def __init__(self) -> None:
        self.kept: tuple | None = None  # (key, copies, value), replaced as a whole: threads may share a layer

    def get(self, sources: tuple[torch.Tensor, ...], key: tuple, make: Callable):
        kept = self.kept
        if kept is None or kept[0] != key or not _equal(sources, kept[1]):
            kept = self.kept = (key, [source.detach().clone() for source in sources], make())
        return kept[2]

    def __deepcopy__(self, memo) -> "_Packed":
        return _Packed()

    def __reduce__(self):
        return _Packed, ()


def _equal(tensors: tuple[torch.Tensor, ...], others: list[torch.Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(*_words(a, b))
        for a, b in zip(tensors, others, strict=True)
    )


def _words(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Many numbers as integers of 64 bits, which PyTorch compares fastest; if they divide into them."""
    if a.numel() < 1 << 14 or not a.is_contiguous() or a.nbytes % 8 or a.storage_offset() * a.itemsize % 8:
        return a, b
    return a.detach().flatten().view(torch.int64), b.flatten().view(torch.int64)
