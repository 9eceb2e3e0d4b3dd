"""The block-diagonal convolution in C, for the CPU: all its steps on a few pixels at a time, in the caches.

`native.c` is the algorithm of `block_diagonal.py`, and so are the outputs but for float noise. `native_library.py`
compiles it. It works on plain arrays of float32 or float64, in PyTorch's own threads; other types are converted.
"""

import ctypes
import math
from dataclasses import dataclass

import torch

from equivision_timm.constants import constant
from equivision_timm.kernel_bases import IrrepsBasis, Kernel, load_irreps_basis
from equivision_timm.layers.conv_strategies.context import check_input
from equivision_timm.layers.conv_strategies.irreps import operator
from equivision_timm.layers.conv_strategies.native_library import Layer, Sparse, library

__all__ = ["Packed", "conv2d", "infer", "pack"]


@dataclass(frozen=True)
class Packed:
    """What `infer` takes: the matrices W of all blocks in the order in which native.c reads them; the bias or None."""

    weights: torch.Tensor
    bias: torch.Tensor | None
    out_fields: int
    in_fields: int


def pack(weights: torch.Tensor, bias: torch.Tensor | None, group: str, kernel_size: int) -> Packed:
    """`block_weights`, and the bias [O] of each field or None, for `infer`."""
    weights = _readable(weights)
    bias = None if bias is None else _readable(bias).to(weights.dtype)
    return Packed(_pack(weights, group, kernel_size, transposed=False), bias, *weights.shape[1:])


def infer(
    x: torch.Tensor,
    packed: Packed,
    group: str,
    kernel_size: int,
    stride: int,
    dilation: int,
    shortcut: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """As `conv2d`, without gradients; then `shortcut` is added, if there is one, and ReLU taken, if `relu`."""
    dtype, x = x.dtype, _readable(x)
    layer, shape = _layer(x, packed.out_fields, packed.in_fields, group, kernel_size, stride, dilation)
    y = x.new_empty(shape)
    if shortcut is not None:
        shortcut = _readable(shortcut).to(x.dtype).expand(shape).contiguous()
    sizes = {"packed": _packed_size(layer, x.dtype, False), "bias": packed.out_fields, "shortcut": y.numel()}
    tensors = {"x": x, "packed": packed.weights, "bias": packed.bias, "shortcut": shortcut}
    _run("forward", layer, tensors | {"relu": int(relu), "y": y}, sizes)
    return y.to(dtype)


def _forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    group: str,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> torch.Tensor:
    _same_dtype(x, weights, bias)
    return infer(x, pack(weights, bias, group, kernel_size), group, kernel_size, stride, dilation)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    group: str,
    kernel_size: int,
    stride: int,
    dilation: int,
    for_x: bool,
    for_weights: bool,
) -> list[torch.Tensor]:
    _same_dtype(x, weights, grad)
    dtype = x.dtype
    grad, x, weights = _readable(grad), _readable(x), _readable(weights)
    layer, shape = _layer(x, *weights.shape[1:], group, kernel_size, stride, dilation)
    packed = dx = sums = dw = None
    threads, sums_size = torch.get_num_threads(), library(x.dtype).sums_size(ctypes.byref(layer))
    if for_x:
        packed, dx = _pack(weights, group, kernel_size, transposed=True), x.new_empty(x.shape)
    if for_weights:
        sums, dw = x.new_empty(threads, sums_size), weights.new_empty(weights.shape)
    sizes = {"dy": math.prod(shape), "packed": _packed_size(layer, x.dtype, True)}
    tensors = {"dy": grad, "x": x, "packed": packed, "dx": dx, "sums": sums, "dw": dw}
    _run("backward", layer, tensors, sizes)
    return [gradient.to(dtype) for gradient in (dx, dw) if gradient is not None]


conv2d = operator("native_conv2d", _forward, _backward)


def _real(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x as native.c reads it: float32 or float64, contiguous, not the negative view of another tensor."""
    return x.to(_real(x.dtype)).resolve_neg().contiguous()


def _same_dtype(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raises RuntimeError, as `nn.Conv2d`, where the weights, the bias or a gradient are of another type than x."""
    for other in others:
        if other is not None and (other.dtype != x.dtype or not x.is_floating_point()):
            raise RuntimeError(f"input type {x.dtype} and weight type {other.dtype} should be the same float type")


def _pack(weights: torch.Tensor, group: str, kernel_size: int, transposed: bool) -> torch.Tensor:
    entries, out_fields, in_fields = weights.shape
    plan = _plan(group, kernel_size, weights.dtype)
    if entries != plan.entries:
        raise ValueError(
            f"the block weights of {group!r}, {kernel_size} x {kernel_size}, are [{plan.entries}, O, I], "
            f"but got {list(weights.shape)}: make them with `block_weights`"
        )
    layer = Layer(order=plan.order, in_fields=in_fields, out_fields=out_fields, kernel_size=kernel_size, **plan.blocks)
    packed = weights.new_empty(_packed_size(layer, weights.dtype, transposed))
    _run("pack", layer, {"weights": weights, "transposed": int(transposed), "packed": packed}, {})
    return packed


def _packed_size(layer: Layer, dtype: torch.dtype, transposed: bool) -> int:
    return library(dtype).packed_size(ctypes.byref(layer), ctypes.c_long(transposed))


@dataclass(frozen=True)
class _Plan:
    """What the group and the kernel size determine, as fields of `Layer`; the tensors whose addresses these are."""

    order: int
    entries: int
    blocks: dict[str, int]
    maps: dict[str, int | Sparse]
    tensors: list[torch.Tensor]


@constant
def _plan(group: str, kernel_size: int, dtype: torch.dtype) -> _Plan:
    basis = load_irreps_basis(Kernel(group, kernel_size))
    tensors = []

    def address(tensor: torch.Tensor) -> int:
        tensors.append(tensor.contiguous())
        return tensors[-1].data_ptr()

    def sparse(matrix: torch.Tensor) -> Sparse:
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1, device="cpu"))
        return Sparse(address(starts), address(columns), address(matrix[rows, columns].to(dtype)))

    sizes, copies = (address(torch.tensor(numbers, device="cpu")) for numbers in zip(*basis.blocks, strict=True))
    blocks = {"n_blocks": len(basis.blocks), "functions": basis.functions, "sizes": sizes, "copies": copies}
    fourier, terms = basis.fourier.to(dtype), _terms(basis)
    maps = {"fourier": address(fourier), "fourier_transposed": address(fourier.T)}
    maps |= {"terms": sparse(terms), "terms_transposed": sparse(terms.T.contiguous())}
    return _Plan(len(fourier), basis.coefficients.shape[1], blocks, maps, tensors)


def _terms(basis: IrrepsBasis) -> torch.Tensor:
    """c of T = c E: rows (block, copy, function, row of the block), columns (a, b, s)."""
    order = len(basis.fourier)
    sets = []  # of each set of functions, rows (block, copy, j, row)
    for functions in basis.sets:
        spread = torch.kron(functions.terms.flatten(1), torch.eye(order, dtype=torch.float64, device="cpu"))
        sets.append(spread if functions.product is None else functions.product @ spread)  # S = spread E, T = A S
    rows, row = [], 0
    for size, copies in basis.blocks:
        for _ in range(copies):
            for functions, own in zip(basis.sets, sets, strict=True):
                n = len(functions.terms)
                rows.append(own[row * n : (row + size) * n])
            row += size
    terms = torch.cat(rows)
    return torch.where(terms.abs() < 1e-12, 0.0, terms)


_PIXELS = 512  # of a chunk, at most: more lines share their neighbours, fewer stay in the second cache


def _layer(
    x: torch.Tensor, out_fields: int, in_fields: int, group: str, kernel_size: int, stride: int, dilation: int
) -> tuple[Layer, tuple[int, int, int, int]]:
    """The layer as native.c sees it, with the size of its chunks; and the shape of the output."""
    plan = _plan(group, kernel_size, x.dtype)
    check_input(x, in_fields, plan.order)
    if min(in_fields, out_fields, stride, dilation) < 1:
        raise ValueError(f"fields {in_fields} and {out_fields}, stride {stride}, dilation {dilation}: use at least 1")
    batch, _, height, width = x.shape
    out_height, out_width = ((size - 1) // stride + 1 for size in (height, width))
    shape = (batch, out_fields * plan.order, out_height, out_width)
    threads = torch.get_num_threads()
    at_once = min(_PIXELS, -(-out_height * out_width * batch // threads))  # so that all threads have some
    if kernel_size == stride == 1:  # no neighbours: the pixels may lie in lines of any length
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
    return Layer(
        *(plan.order, in_fields, out_fields, kernel_size, stride, dilation),
        *(batch, height, width, out_height, out_width, images, rows),
        **plan.blocks,
        **plan.maps,
    ), shape


def _run(name: str, layer: Layer, arguments: dict[str, torch.Tensor | int | None], sizes: dict[str, int]) -> None:
    """Function `name` of native.c, in all threads; lets go of Python's lock.

    Args:
        name: 'pack', 'forward' or 'backward'.
        layer: the layer.
        arguments: what the function takes after the layer, by name and in its order.
        sizes: how many values some of the tensors must hold; the others are made here, of the layer's own sizes.

    Raises:
        ValueError: a tensor that C could not read or write, or would read or write past its end.
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
    if getattr(library(dtype), name)(ctypes.byref(layer), *values, ctypes.c_long(torch.get_num_threads())):
        raise MemoryError(f"no memory for a convolution in chunks of {layer.images} x {layer.rows} lines")


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
