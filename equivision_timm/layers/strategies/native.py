"""The block-diagonal convolution in C, for the CPU: all its steps on a few pixels at a time, in the caches.

`native.c` is the algorithm of `block_diagonal.py`, and so are the outputs but for float noise. `native_library.py`
loads it. It works on plain arrays of float32 or float64, in PyTorch's own threads; other types are converted.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from equivision_timm.constants import constant
from equivision_timm.irreps_basis import IrrepsBasis, load_irreps_basis, sums_and_differences
from equivision_timm.kernels import Kernel
from equivision_timm.layers.strategies import native_library
from equivision_timm.layers.strategies.basis import block_counts, named_kernel
from equivision_timm.layers.strategies.block_diagonal import block_weights
from equivision_timm.layers.strategies.context import check_input
from equivision_timm.layers.strategies.contract import Layer, Strategy, register
from equivision_timm.layers.strategies.native_library import CLayer, CSparse, library
from equivision_timm.layers.strategies.native_operator import operator

__all__ = ["Native", "Packed", "convolve"]


_REALS = (torch.float32, torch.float64)
_SIZES = (1, 3, 5)  # k of the kernels that native.c knows


@dataclass(frozen=True)
class Packed:
    """What `infer` takes: the matrices W of all blocks in the order in which native.c reads them; the bias or None."""

    weights: torch.Tensor
    bias: torch.Tensor | None
    out_fields: int
    in_fields: int


@register
class Native(Strategy):
    name = "native"
    plain_operations = False

    def supports(self, layer: Layer) -> str | None:
        if layer.kernel.input_type != "regular":
            return f"it needs regular fields, but the input of this layer is {layer.kernel.input_type}"
        if layer.kernel.size not in _SIZES:
            known, size = ", ".join(f"{k} x {k}" for k in _SIZES), layer.kernel.size
            return f"native.c knows kernels of {known}, not {size} x {size}"
        if layer.device.type not in ("cpu", "meta"):
            return f"it runs on the CPU, but this layer is on {layer.device}"
        return native_library.why_not()

    def estimate(self, layer: Layer, shape: tuple[int, ...]) -> float:
        """It is no choice in low precision, where values are converted, and where no product is saved.

        That is for the trivial group and single pixels; a larger kernel of that group has fewer functions than pixels.
        """
        saves = layer.order > 1 or layer.kernel.size > 1
        if layer.dtype not in _REALS or not saves or native_library.why_not():
            return math.inf
        batch, _, height, width = shape
        out_height, out_width = layer.out_size(height, width)
        pixels, per_pair, rows = batch * out_height * out_width, *block_counts(layer.kernel.name)
        weights = layer.in_fields * layer.out_fields * per_pair
        return pixels * weights / 35e9 + 0.7e-9 * pixels * layer.in_fields * rows + 1.3e-9 * weights

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, layer: Layer) -> Packed:
        weights = block_weights(weight, layer.kernel.name).to(layer.dtype)
        return _packed(weights, None if bias is None else bias.to(layer.dtype), layer.kernel.name)

    def infer(
        self,
        x: torch.Tensor,
        packed: Packed,
        layer: Layer,
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        return _infer(x, packed, layer.kernel.name, layer.stride, layer.dilation, shortcut, relu)

    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        weights = block_weights(weight, layer.kernel.name).to(layer.dtype)
        return convolve(x, weights, layer.kernel.name, layer.stride, layer.dilation)


def _packed(weights: torch.Tensor, bias: torch.Tensor | None, kernel: str) -> Packed:
    weights = _readable(weights)
    bias = None if bias is None else _readable(bias)
    return Packed(_pack(weights, kernel, transposed=False), bias, *weights.shape[1:])


def _infer(
    x: torch.Tensor,
    packed: Packed,
    kernel: str,
    stride: int,
    dilation: int,
    shortcut: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    dtype, x = x.dtype, _readable(x)
    layer, shape = _layer(x, packed.out_fields, packed.in_fields, kernel, stride, dilation)
    y = x.new_empty(shape)
    if shortcut is not None:
        shortcut = _readable(shortcut).to(x.dtype).expand(shape).contiguous()
    sizes = {"packed": _packed_size(layer, x.dtype, False), "bias": packed.out_fields, "shortcut": y.numel()}
    tensors = {"x": x, "packed": packed.weights, "bias": packed.bias, "shortcut": shortcut}
    _run("forward", layer, tensors | {"relu": int(relu), "y": y}, sizes)
    return y.to(dtype)


def _forward(x: torch.Tensor, weights: torch.Tensor, kernel: str, stride: int, dilation: int) -> torch.Tensor:
    _same_dtype(x, weights)
    return _infer(x, _packed(weights, None, kernel), kernel, stride, dilation)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    kernel: str,
    stride: int,
    dilation: int,
    for_x: bool,
    for_weights: bool,
) -> list[torch.Tensor]:
    _same_dtype(x, weights, grad)
    dtype = x.dtype
    grad, x, weights = _readable(grad), _readable(x), _readable(weights)
    _, out_fields, in_fields = weights.shape
    layer, shape = _layer(x, out_fields, in_fields, kernel, stride, dilation)
    packed = dx = sums = dw = None
    threads, sums_size = torch.get_num_threads(), library(x.dtype).sums_size(ctypes.byref(layer))
    if for_x:
        packed, dx = _pack(weights, kernel, transposed=True), x.new_empty(x.shape)
    if for_weights:
        sums, dw = x.new_empty(threads, sums_size), weights.new_empty(weights.shape)
    sizes = {"dy": math.prod(shape), "packed": _packed_size(layer, x.dtype, True)}
    tensors = {"dy": grad, "x": x, "packed": packed, "dx": dx, "sums": sums, "dw": dw}
    _run("backward", layer, tensors, sizes)
    return [gradient.to(dtype) for gradient in (dx, dw) if gradient is not None]


convolve: Callable[..., torch.Tensor] = operator("native_conv2d", _forward, _backward)


def _real(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x as native.c reads it: float32 or float64, contiguous, not the negative view of another tensor."""
    return x.to(_real(x.dtype)).resolve_neg().contiguous()


def _same_dtype(x: torch.Tensor, *others: torch.Tensor) -> None:
    """Raises RuntimeError, as `nn.Conv2d`, where the weights or a gradient are of another type than x."""
    for other in others:
        if other.dtype != x.dtype or not x.is_floating_point():
            raise RuntimeError(f"input type {x.dtype} and weight type {other.dtype} should be the same float type")


def _pack(weights: torch.Tensor, kernel: str, transposed: bool) -> torch.Tensor:
    entries, out_fields, in_fields = weights.shape
    plan = _plan(kernel, weights.dtype)
    if entries != plan.entries:
        raise ValueError(
            f"the block weights of {kernel!r} are [{plan.entries}, O, I], but got {list(weights.shape)}: "
            "make them with `block_weights`"
        )
    layer = CLayer(order=plan.order, in_fields=in_fields, out_fields=out_fields, **plan.blocks)
    packed = weights.new_empty(_packed_size(layer, weights.dtype, transposed))
    _run("pack", layer, {"weights": weights, "transposed": int(transposed), "packed": packed}, {})
    return packed


def _packed_size(layer: CLayer, dtype: torch.dtype, transposed: bool) -> int:
    return library(dtype).packed_size(ctypes.byref(layer), ctypes.c_long(transposed))


@dataclass(frozen=True)
class _Plan:
    """What the kernels determine, as fields of `CLayer`; the tensors whose addresses these are."""

    order: int
    entries: int
    blocks: dict[str, int]
    maps: dict[str, int | CSparse]
    tensors: list[torch.Tensor]


@constant
def _plan(name: str, dtype: torch.dtype) -> _Plan:
    kernel = named_kernel(name)
    basis = load_irreps_basis(kernel)
    tensors = []

    def address(tensor: torch.Tensor) -> int:
        tensors.append(tensor.contiguous())
        return tensors[-1].data_ptr()

    def sparse(matrix: torch.Tensor) -> CSparse:
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1, device="cpu"))
        return CSparse(address(starts), address(columns), address(matrix[rows, columns].to(dtype)))

    sizes, copies = (address(torch.tensor(numbers, device="cpu")) for numbers in zip(*basis.blocks, strict=True))
    blocks = {"n_blocks": len(basis.blocks), "functions": len(basis.functions), "sizes": sizes, "copies": copies}
    fourier, terms = basis.fourier.to(dtype), _terms(basis, _sums_of_neighbours(kernel))
    maps = {"kernel_size": kernel.size, "low_pass": int(_is_blurred(kernel))}
    maps |= {"fourier": address(fourier), "fourier_transposed": address(fourier.T)}
    maps |= {"terms": sparse(terms), "terms_transposed": sparse(terms.T.contiguous())}
    return _Plan(len(fourier), basis.coefficients.shape[1], blocks, maps, tensors)


def _is_blurred(kernel: Kernel) -> bool:
    """Whether native.c sums over 5 x 5 pixels what is three sums along each axis, and not five."""
    return kernel.low_pass and kernel.size == 5


def _sums_of_neighbours(kernel: Kernel) -> torch.Tensor:
    """e [n, k], the sums and differences that native.c makes of the k pixels around one, along each axis."""
    if not _is_blurred(kernel):
        return sums_and_differences(kernel.size)
    rows = [[0, 1, 2, 1, 0], [1, 2, 2, 2, 1], [-1, -2, 0, 2, 1]]  # [1, 2, 1] * those of k = 3
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _terms(basis: IrrepsBasis, e: torch.Tensor) -> torch.Tensor:
    """c of T = c E, E = e_a(y) e_b(x) * f^: rows (block, copy, function, row of the block), columns (a, b, s)."""
    inverse = torch.linalg.pinv(torch.kron(e, e))  # [k * k, n * n]
    every = torch.eye(len(basis.fourier), dtype=torch.float64, device="cpu")
    terms = basis.coupling @ torch.kron(basis.functions.flatten(1) @ inverse, every)  # S = kron(...) E
    return torch.where(terms.abs() < 1e-12, 0.0, terms)


_PIXELS = 512  # of a chunk, at most: more lines share their neighbours, fewer stay in the second cache


def _layer(
    x: torch.Tensor, out_fields: int, in_fields: int, kernel: str, stride: int, dilation: int
) -> tuple[CLayer, tuple[int, int, int, int]]:
    """The layer as native.c sees it, with the size of its chunks; and the shape of the output."""
    plan = _plan(kernel, x.dtype)
    check_input(x, in_fields, plan.order)
    if min(in_fields, out_fields, stride, dilation) < 1:
        raise ValueError(f"fields {in_fields} and {out_fields}, stride {stride}, dilation {dilation}: use at least 1")
    batch, _, height, width = x.shape
    out_height, out_width = ((size - 1) // stride + 1 for size in (height, width))
    shape = (batch, out_fields * plan.order, out_height, out_width)
    threads = torch.get_num_threads()
    at_once = min(_PIXELS, -(-out_height * out_width * batch // threads))  # so that all threads have some
    if plan.maps["kernel_size"] == stride == 1:  # no neighbours: the pixels may lie in lines of any length
        pixels = height * width
        width = out_width = next(n for n in range(max(1, min(pixels, at_once)), 0, -1) if pixels % n == 0)
        height = out_height = pixels // width
    if out_height * out_width <= at_once:  # some images at a time, but some for each thread
        images = max(1, min(at_once // (out_height * out_width), -(-batch // threads)))
        rows = out_height
    else:  # some lines of one image, as many each time
        images = 1
        chunks = -(-out_height // max(1, at_once // out_width))
        rows = -(-out_height // chunks)
    numbers = {"order": plan.order, "in_fields": in_fields, "out_fields": out_fields}
    numbers |= {"stride": stride, "dilation": dilation, "batch": batch, "images": images, "rows": rows}
    numbers |= {"in_height": height, "in_width": width, "out_height": out_height, "out_width": out_width}
    return CLayer(**numbers, **plan.blocks, **plan.maps), shape


def _run(name: str, layer: CLayer, arguments: dict[str, torch.Tensor | int | None], sizes: dict[str, int]) -> None:
    """Function `name` of native.c, in all threads; lets go of Python's lock.

    Args:
        name: 'pack', 'forward' or 'backward'.
        layer: the layer.
        arguments: what the function takes after the layer, by name and in its order.
        sizes: how many values some of the tensors must hold; the others are made here, of the layer's own sizes.

    Raises:
        ValueError: a tensor that C could not read or write, or would read or write past its end.
            Or kernels that C does not know.
        MemoryError: no memory for the work.
    """
    tensors = {argument: tensor for argument, tensor in arguments.items() if isinstance(tensor, torch.Tensor)}
    dtype = next(iter(tensors.values())).dtype
    for argument, tensor in tensors.items():
        _check_memory(argument, tensor, dtype, sizes.get(argument, tensor.numel()))
    values = [
        ctypes.c_long(argument)
        if isinstance(argument, int)
        else ctypes.c_void_p(None if argument is None else argument.data_ptr())
        for argument in arguments.values()
    ]
    code = getattr(library(dtype), name)(ctypes.byref(layer), *values, ctypes.c_long(torch.get_num_threads()))
    if code == 1:
        raise MemoryError(f"no memory for a convolution in chunks of {layer.images} x {layer.rows} lines")
    if code:
        raise ValueError(f"native.c does not know kernels of {layer.kernel_size} x {layer.kernel_size} pixels")


def _check_memory(name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int) -> None:
    """Raises ValueError unless `size` values of `dtype` lie one behind the other where `tensor` says."""
    if tensor.device.type != "cpu":
        raise ValueError(f"conv_strategy 'native' runs on the CPU, but a tensor is on {tensor.device}: use 'auto'")
    if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
        raise ValueError(
            f"conv_strategy 'native' expects {size} contiguous values of {dtype} as {name}, but got "
            f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
        )
    held = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
    if size and (held < size or not tensor.data_ptr()):
        raise ValueError(f"conv_strategy 'native' expects {size} values as {name}, but its memory was freed")
