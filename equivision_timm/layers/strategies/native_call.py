"""Calls of native.c: tensors become plain arrays, and every size is checked first.

native.c works on contiguous arrays of float32 or float64, in PyTorch's own threads; other types are converted.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from equivision_timm.constants import constant
from equivision_timm.irreps_basis import IrrepsBasis, load_irreps_basis, sums_and_differences
from equivision_timm.kernels import Kernel
from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.layers.strategies.native_library import CLayer, CSparse, library

__all__ = ["SIZES", "backward", "convolve", "forward", "pack", "unpack"]

SIZES = (1, 3, 5)  # k of the kernels in native.c
_PIXELS = 512  # of a chunk, at most: more rows share their neighbours, fewer stay in the second-level cache


def pack(weight: torch.Tensor, kernel: str) -> torch.Tensor:
    """The block weights of the coefficients `weight` [O, I, n_basis, 1] in the order of native.c, [n, tile_rows].

    `tile_rows` depends on the processor: weights packed for another one have another shape.

    Raises:
        ValueError: another number of coefficients than these kernels have.
    """
    weight = _readable(weight)
    out_fields, in_fields, n_basis = weight.shape[:3]
    call = _call(kernel, weight.dtype, out_fields, in_fields)
    if n_basis != call.layer.n_basis:
        raise ValueError(f"{kernel!r} has {call.layer.n_basis} coefficients, but got {list(weight.shape)}")
    packed = weight.new_empty(call.packed)
    _run("pack_coefficients", call.layer, {"weights": weight, "packed": packed}, {})
    return packed.view(-1, call.tile_rows)


def unpack(packed: torch.Tensor, kernel: str, out_fields: int) -> torch.Tensor:
    """The block weights W [entries, O, I] that `pack` packed."""
    plan, tile = _plan(kernel, packed.dtype), packed.shape[1]
    lines = [-(-size * out_fields // tile) * plan.functions * size for size in plan.sizes]  # for one input field
    in_fields, weights, start = len(packed) // sum(lines), [], 0
    for size, count in zip(plan.sizes, lines, strict=True):
        rows, columns = size * out_fields, plan.functions * size * in_fields
        block = packed[start : start + count * in_fields].view(-1, columns, tile).transpose(1, 2)
        matrix = block.reshape(-1, columns)[:rows]  # [tiles, tile, columns] -> [size * O, n * size * I]
        matrix = matrix.view(size, out_fields, plan.functions * size, in_fields).transpose(1, 2)
        weights.append(matrix.reshape(-1, out_fields, in_fields))  # [size, n * size, O, I] -> [entries, O, I]
        start += count * in_fields
    return torch.cat(weights)


def convolve(x: torch.Tensor, weight: torch.Tensor, kernel: str, stride: int, dilation: int) -> torch.Tensor:
    """K(w) * x, [B, O * |G|, H', W'], of the type of x, for the coefficients `weight` [O, I, n_basis, 1].

    Raises:
        ValueError: shapes that do not fit.
    """
    dtype, x, weight = x.dtype, _readable(x), _readable(weight)
    call = _call_for(kernel, x.dtype, weight.shape[0], stride, dilation, *x.shape, torch.get_num_threads())
    y = x.new_empty(call.shape)
    sizes = {"weight": weight.shape[0] * call.layer.in_fields * call.layer.n_basis}
    _run("convolve", call.layer, {"x": x, "weight": weight, "y": y}, sizes)
    return y.to(dtype)


def forward(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    shortcut: torch.Tensor | None,
    relu: bool,
    kernel: str,
    out_fields: int,
    stride: int,
    dilation: int,
) -> torch.Tensor:
    """act(K * x + bias + shortcut), [B, O * |G|, H', W'], of the type of x; act is ReLU or nothing.

    Args:
        x: [B, I * |G|, H, W].
        packed: by `pack`.
        bias: [O], added to each field, or None.
        shortcut: [B, O * |G|, H', W'] or None.
        relu: whether to end with ReLU.
        kernel: name of the kernels.
        out_fields: O.
        stride: of the convolution.
        dilation: of the convolution.

    Raises:
        ValueError: a shape that does not fit, or weights packed for another processor.
    """
    dtype, x = x.dtype, _readable(x)
    call = _call_for(kernel, x.dtype, out_fields, stride, dilation, *x.shape, torch.get_num_threads())
    if packed.shape[1] != call.tile_rows:
        raise ValueError(
            f"weights packed in tiles of {packed.shape[1]} rows cannot be used on this processor, which has "
            f"{call.tile_rows}: call `fuse` on the machine that runs the model"
        )
    y = x.new_empty(call.shape)
    if shortcut is not None:
        shortcut = shortcut.to(x.dtype).expand(call.shape).resolve_neg().contiguous()
    sizes = {"packed": call.packed, "bias": out_fields, "shortcut": y.numel()}
    tensors = {"x": x, "packed": packed, "bias": bias, "shortcut": shortcut, "relu": int(relu), "y": y}
    _run("forward", call.layer, tensors, sizes)
    return y.to(dtype)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    kernel: str,
    stride: int,
    dilation: int,
    for_x: bool,
    for_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients with respect to x and the block weights [entries, O, I]; one that is not wanted is empty."""
    dtype = x.dtype
    grad, x, weights = _readable(grad), _readable(x), _readable(weights)
    threads = torch.get_num_threads()
    call = _call_for(kernel, x.dtype, weights.shape[1], stride, dilation, *x.shape, threads)
    dx = sums = dw = None
    if for_x:
        dx = x.new_empty(x.shape)
    if for_weights:
        sums = x.new_empty(threads, call.sums)
        dw = weights.new_empty(weights.shape)
    sizes = {"dy": math.prod(call.shape), "weights": weights.shape[1] * call.layer.in_fields * call.layer.n_entries}
    tensors = {"dy": grad, "x": x, "weights": weights, "dx": dx, "sums": sums, "dw": dw}
    _run("backward", call.layer, tensors, sizes)
    empty = x.new_empty(0, dtype=dtype)
    return empty if dx is None else dx.to(dtype), empty.clone() if dw is None else dw.to(dtype)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x as native.c reads it: float32 or float64, contiguous, not the negative view of another tensor."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).resolve_neg().contiguous()


@dataclass(frozen=True)
class _Plan:
    """The fields of `CLayer` that the kernels determine, and the tensors whose addresses are among them."""

    order: int
    functions: int
    sizes: tuple[int, ...]
    fields: dict[str, int | CSparse]
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

    sizes, copies = zip(*basis.blocks, strict=True)
    fourier, terms = basis.fourier.to(dtype), _terms(basis, _sums_of_neighbours(kernel))
    n_basis, n_entries = basis.coefficients.shape
    entries = torch.where(basis.coefficients.abs() < 1e-12, 0.0, basis.coefficients).T.contiguous()
    fields: dict[str, int | CSparse] = {"order": len(fourier), "kernel_size": kernel.size}
    fields |= {"n_blocks": len(sizes), "functions": len(basis.functions), "n_basis": n_basis, "n_entries": n_entries}
    fields |= {name: address(torch.tensor(t, device="cpu")) for name, t in (("sizes", sizes), ("copies", copies))}
    fields |= {"fourier": address(fourier), "fourier_transposed": address(fourier.T), "entries": sparse(entries)}
    fields |= {"terms": sparse(terms), "terms_transposed": sparse(terms.T.contiguous())}
    fields["low_pass"] = int(_is_blurred(kernel))
    return _Plan(len(fourier), len(basis.functions), sizes, fields, tensors)


def _is_blurred(kernel: Kernel) -> bool:
    """Whether native.c makes three sums over 5 pixels along each axis, not five."""
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


@dataclass(frozen=True)
class _Call:
    """A layer as native.c sees it, and the sizes of the arrays that it needs."""

    layer: CLayer
    shape: tuple[int, ...]  # of the output
    packed: int
    sums: int  # for each thread
    tile_rows: int


@lru_cache(maxsize=1024)
def _call(
    kernel: str, dtype: torch.dtype, out_fields: int, in_fields: int, shape: tuple[int, ...] = (), **geometry: int
) -> _Call:
    code = library(dtype)
    layer = CLayer(out_fields=out_fields, in_fields=in_fields, **_plan(kernel, dtype).fields, **geometry)
    packed = code.packed_size(ctypes.byref(layer), ctypes.c_long(0))
    return _Call(layer, shape, packed, code.sums_size(ctypes.byref(layer)), code.tile_rows())


@lru_cache(maxsize=1024)
def _call_for(
    kernel: str,
    dtype: torch.dtype,
    out_fields: int,
    stride: int,
    dilation: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    threads: int,
) -> _Call:
    """The call for maps of this size, cut into chunks for the threads."""
    plan = _plan(kernel, dtype)
    in_fields = channels // plan.order
    if channels % plan.order or min(in_fields, out_fields, stride, dilation, height, width) < 1:
        raise ValueError(
            f"a convolution of {kernel!r} takes fields [B, fields * {plan.order}, H, W] of at least 1 x 1 pixels, "
            f"stride and dilation of at least 1, but got {[batch, channels, height, width]}, {stride} and {dilation}"
        )
    out_height, out_width = ((size - 1) // stride + 1 for size in (height, width))
    shape = (batch, out_fields * plan.order, out_height, out_width)
    at_once = min(_PIXELS, -(-out_height * out_width * batch // threads))  # so that all threads have some
    if plan.fields["kernel_size"] == stride == 1:  # no neighbours: the pixels may be cut into rows of any length
        pixels = height * width
        width = out_width = next(n for n in range(max(1, min(pixels, at_once)), 0, -1) if pixels % n == 0)
        height = out_height = pixels // width
    if out_height * out_width <= at_once:  # some images at a time, but some for each thread
        images = max(1, min(at_once // (out_height * out_width), -(-batch // threads)))
        rows = out_height
    else:  # some rows of one image, as many each time
        images = 1
        chunks = -(-out_height // max(1, at_once // out_width))
        rows = -(-out_height // chunks)
    geometry = {"stride": stride, "dilation": dilation, "batch": batch, "images": images, "rows": rows}
    geometry |= {"in_height": height, "in_width": width, "out_height": out_height, "out_width": out_width}
    return _call(kernel, dtype, out_fields, in_fields, shape, **geometry)


def _run(name: str, layer: CLayer, arguments: dict[str, torch.Tensor | int | None], sizes: dict[str, int]) -> None:
    """Call a function of native.c in all threads; Python's global lock is released meanwhile.

    Args:
        name: of the function.
        layer: the layer.
        arguments: those after the layer, by name and in order.
        sizes: how many values some of the tensors must hold; the others are made here, of the layer's own sizes.

    Raises:
        ValueError: a tensor that C could not read or write, or would read or write past its end; or kernels that
            native.c does not have.
        MemoryError: no memory for the work.
    """
    dtype, values = None, []
    for argument, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            values.append(ctypes.c_void_p(None) if value is None else ctypes.c_long(value))
            continue
        dtype = dtype or value.dtype
        size = sizes.get(argument, value.numel())
        if value.device.type != "cpu":
            raise ValueError(f"conv_strategy 'native' runs on the CPU, but a tensor is on {value.device}: use 'auto'")
        if value.dtype != dtype or value.numel() != size or not value.is_contiguous():
            raise ValueError(
                f"conv_strategy 'native' expects {size} contiguous values of {dtype} as {argument}, but got "
                f"{list(value.shape)} of {value.dtype}, strides {value.stride()}"
            )
        held = value.untyped_storage().nbytes() // value.itemsize - value.storage_offset()
        if size and (held < size or not value.data_ptr()):
            raise ValueError(f"conv_strategy 'native' expects {size} values as {argument}, but its memory was freed")
        values.append(ctypes.c_void_p(value.data_ptr()))
    assert dtype is not None
    code = getattr(library(dtype), name)(ctypes.byref(layer), *values, ctypes.c_long(torch.get_num_threads()))
    if code == 1:
        raise MemoryError(f"no memory for a convolution in chunks of {layer.images} x {layer.rows} rows")
    if code:
        raise ValueError(f"native.c has no kernels of {layer.kernel_size} x {layer.kernel_size} pixels")
