"""Steerable convolution: learns the coefficients of a frozen kernel basis, not the pixels of a filter."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.groups import Group
from equivision_timm.kernel_bases import load_irreps_basis, load_kernel_basis
from equivision_timm.layers.conv_strategies import STRATEGIES, auto, block_diagonal, expand, native, native_library
from equivision_timm.layers.conv_strategies.irreps import block_weights

__all__ = ["SteerableConv2d"]

_CODE = {"expand": expand, "block_diagonal": block_diagonal, "native": native}


@register_notrace_module  # the strategy follows from shapes: one node for torch.fx
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
        device: where to create the parameters and buffers.
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
        self.order = Group.from_name(group).order

        basis = load_kernel_basis(group, kernel_size, input_type)
        n_basis, _, inputs = basis.coefficients.shape
        self.weight = nn.Parameter(torch.empty(out_fields, in_fields, n_basis, 1, **dd))
        self.kernel_shape = [self.order, inputs, kernel_size, kernel_size]
        # Two axes instead of five: a channels-last model takes no 5-D buffers
        self.register_buffer("basis", torch.empty(n_basis, math.prod(self.kernel_shape), **dd), persistent=False)
        entries = 0  # of the strategies in the irreps basis, which take regular input only
        if input_type == "regular":
            irreps_basis = load_irreps_basis(group, kernel_size)
            entries = irreps_basis.coefficients.shape[1]
            self.irreps_products = irreps_basis.products
        self.register_buffer("irreps_basis", torch.empty(n_basis, entries, **dd), persistent=False)
        self.check_strategy(strategy)
        self.strategy = strategy
        self._prepared = _Prepared()
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
        return auto.choose(
            shape,
            device,
            dtype,
            self.in_fields,
            self.out_fields,
            self.kernel_size,
            self.stride,
            self.order,
            self.irreps_products,
        )

    def reset_parameters(self) -> None:
        """Draw the coefficients, w_b ~ N(0, he_std_b^2 / in_fields), and refill the basis."""
        he_std = load_kernel_basis(self.group, self.kernel_size, self.input_type).he_std
        std = (he_std / math.sqrt(self.in_fields)).to(self.weight)
        with torch.no_grad():
            self.weight.normal_().mul_(std[:, None])  # std over the axis of the basis
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Refill the basis in both its forms, which no checkpoint carries (after `to_empty`, say)."""
        self.basis.copy_(load_kernel_basis(self.group, self.kernel_size, self.input_type).sample().flatten(1))
        if self.input_type == "regular":
            self.irreps_basis.copy_(load_irreps_basis(self.group, self.kernel_size).coefficients)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            basis = self.basis.unflatten(1, self.kernel_shape)  # [n_basis, |G|, H, k, k]
            filters = expand.expand_filter(self.weight, basis)
            return F.conv2d(x, filters, None, self.stride, self.padding, self.dilation)
        else:
            return self.convolve(x)

    @torch.jit.unused
    def convolve(
        self,
        x: torch.Tensor,
        fold: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        sources: Sequence[torch.Tensor] = (),
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        """The convolution of x with the coefficients, or with the coefficients and the bias that `fold` makes of them.

        Without gradients what the strategy makes of the coefficients is kept from call to call on the CPU, as long as
        they and the `sources` of `fold` hold the same numbers: they are compared at every call, so that no change of
        theirs, however made, meets an old filter.

        Args:
            x: as for `forward`.
            fold: weight -> (weight, bias), or None.
            sources: what `fold` depends on.
            shortcut: without gradients: is added to the output, or None.
            relu: without gradients: whether to end with ReLU.
        """
        dtype = self.weight.dtype
        if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)  # as autocast treats nn.Conv2d
            x = x.to(dtype)
        strategy = "expand" if expand.leaves_python() else self.strategy_for(x.shape, x.device, dtype)
        code, layer = _CODE[strategy], (self.group, self.kernel_size, self.stride, self.dilation)

        if torch.is_grad_enabled() or torch.compiler.is_compiling() or expand.leaves_python():
            return code.conv2d(x, *self._prepare(strategy, dtype, fold), *layer)

        def pack():
            return code.pack(*self._prepare(strategy, dtype, fold), self.group, self.kernel_size)

        if x.device.type == "cpu":
            basis = self.basis if strategy == "expand" else self.irreps_basis
            packed = self._prepared.get((self.weight, basis, *sources), (strategy, dtype), pack)
        else:  # to compare numbers would wait for the device
            packed = pack()
        return code.infer(x, packed, *layer, shortcut, relu)

    @torch.jit.unused
    def _prepare(
        self, strategy: str, dtype: torch.dtype, fold: Callable | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The filter or the block weights; and the bias, if `fold` makes one."""
        weight, bias = (self.weight, None) if fold is None else fold(self.weight)
        weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
        weights = self._filter(weight) if strategy == "expand" else block_weights(weight, self.irreps_basis.to(dtype))
        return weights, bias

    def _filter(self, weight: torch.Tensor) -> torch.Tensor:
        basis = self.basis.to(weight).unflatten(1, self.kernel_shape)  # [n_basis, |G|, H, k, k]
        return expand.expand_filter(weight, basis)

    def fuse(self, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> nn.Conv2d:
        """The plain convolution that computes the same, for deployment; called by timm's `reparameterize_model`.

        Args:
            weight: coefficients to use in place of the layer's own.
            bias: one number for each output field, or None.
        """
        with torch.no_grad():
            filters = self._filter(self.weight if weight is None else weight)
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
            conv.weight = nn.Parameter(filters.detach().contiguous())
            if bias is not None:
                conv.bias = nn.Parameter(bias.detach().repeat_interleave(self.order))
        return conv

    def extra_repr(self) -> str:
        return (
            f"{self.in_fields}, {self.out_fields}, kernel_size={self.kernel_size}, group={self.group!r}, "
            f"input_type={self.input_type!r}, stride={self.stride}, dilation={self.dilation}, "
            f"strategy={self.strategy!r}"
        )


class _Prepared:
    """The last value made of some tensors, and copies of them to compare with. Neither copied nor saved."""

    def __init__(self) -> None:
        self.kept: tuple | None = None  # (key, copies, value), replaced as a whole: threads may share a layer

    def get(self, sources: tuple[torch.Tensor, ...], key: tuple, make: Callable):
        kept = self.kept
        if kept is None or kept[0] != key or not _equal(sources, kept[1]):
            kept = self.kept = (key, [source.detach().clone() for source in sources], make())
        return kept[2]

    def __deepcopy__(self, memo) -> "_Prepared":
        return _Prepared()

    def __reduce__(self):
        return _Prepared, ()


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
