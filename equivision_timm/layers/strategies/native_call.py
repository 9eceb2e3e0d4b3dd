"""Calls of native.c: tensors become plain arrays, and every size is checked first.

native.c works on contiguous arrays of float32 or float64, in PyTorch's own threads; other types are converted.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from equivision_timm.constants import constant
from equivision_timm.irreps_basis import load_irreps_basis, sums_and_differences
from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.layers.strategies.native_library import CLayer, CSparse, library

__all__ = ["SIZES", "backward", "convolve", "forward", "pack", "unpack"]

SIZES = (1, 3, 5)  # k of the kernels in native.c
_PIXELS = 512  # of a chunk, at most: more rows share their neighbours, fewer stay in the second-level cache


def pack(weight: torch.Tensor, kernel: str) -> torch.Tensor:
    """The block weights of the coefficients `weight` [O, I, n_basis, 1] in the order of native.c, [n, tile_rows].

    Weights packed for another processor have another shape.
    """
    weight = _readable(weight)
    out_fields, in_fields = weight.shape[:2]
    shape = (1, in_fields * named_kernel(kernel).order, 1, 1)
    call = _call(kernel, weight.dtype, out_fields, 1, 1, shape, torch.get_num_threads())
    packed = weight.new_empty(call.sizes["packed"])
    call.run("pack_coefficients", weight=weight, packed=packed)
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
    """K(w) * x, [B, O * |G|, H', W'], of the type of x, for the coefficients `weight` [O, I, n_basis, 1]."""
    dtype, x, weight = x.dtype, _readable(x), _readable(weight)
    call = _call(kernel, x.dtype, weight.shape[0], stride, dilation, x.shape, torch.get_num_threads())
    y = x.new_empty(call.shape)
    call.run("convolve", x=x, weight=weight, y=y)
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
    """act(K * x + bias + shortcut), as the shortcut [B, O * |G|, H', W'], of the type of x; act is ReLU or nothing.

    The weights are packed by `pack`; bias is [O].
    """
    dtype, x = x.dtype, _readable(x)
    call = _call(kernel, x.dtype, out_fields, stride, dilation, x.shape, torch.get_num_threads())
    if packed.shape[1] != call.tile_rows:
        raise ValueError(
            f"weights packed in tiles of {packed.shape[1]} rows cannot be used on this processor, which has "
            f"{call.tile_rows}: call `fuse` on the machine that runs the model"
        )
    y = x.new_empty(call.shape)
    if shortcut is not None:
        shortcut = shortcut.to(x.dtype).expand(call.shape).resolve_neg().contiguous()
    call.run("forward", x=x, packed=packed, bias=bias, shortcut=shortcut, relu=int(relu), y=y)
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
    call = _call(kernel, x.dtype, weights.shape[1], stride, dilation, x.shape, torch.get_num_threads())
    dx = torch.empty_like(x) if for_x else None
    sums = x.new_empty(call.sizes["sums"]) if for_weights else None
    dw = torch.empty_like(weights) if for_weights else None
    call.run("backward", dy=grad, x=x, weights=weights, dx=dx, sums=sums, dw=dw)
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
        matrix = torch.where(matrix.abs() < 1e-12, 0.0, matrix)
        rows, columns = matrix.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(matrix) + 1, device="cpu"))
        return CSparse(address(starts), address(columns), address(matrix[rows, columns].to(dtype)))

    e = sums_and_differences(kernel.size)  # [n, k]: the sums along an axis that native.c makes of the pixels around one
    blurred = kernel.low_pass and kernel.size == 5
    if blurred:  # three of them: [1, 2, 1] * those of k = 3
        rows = [[0, 1, 2, 1, 0], [1, 2, 2, 2, 1], [-1, -2, 0, 2, 1]]
        e = torch.tensor(rows, dtype=torch.float64, device="cpu")
    # c of T = c E, E = e_a(y) e_b(x) * f^: rows (block, copy, function, row of the block), columns (a, b, s)
    phi = basis.functions.flatten(1) @ torch.linalg.pinv(torch.kron(e, e))  # [J, n * n]
    order = len(basis.fourier)
    terms = basis.coupling @ torch.kron(phi, torch.eye(order, dtype=torch.float64, device="cpu"))  # S = kron(...) E

    sizes, copies = zip(*basis.blocks, strict=True)
    fourier, functions = basis.fourier.to(dtype), len(basis.functions)
    n_basis, n_entries = basis.coefficients.shape
    fields: dict[str, int | CSparse] = {"order": order, "kernel_size": kernel.size, "low_pass": int(blurred)}
    fields |= {"n_blocks": len(sizes), "functions": functions, "n_basis": n_basis, "n_entries": n_entries}
    fields |= {name: address(torch.tensor(t, device="cpu")) for name, t in (("sizes", sizes), ("copies", copies))}
    fields |= {"fourier": address(fourier), "fourier_transposed": address(fourier.T)}
    fields |= {"entries": sparse(basis.coefficients.T), "terms": sparse(terms), "terms_transposed": sparse(terms.T)}
    return _Plan(order, functions, sizes, fields, tensors)


@dataclass(frozen=True)
class _Call:
    """A layer as native.c sees it, for maps of one size."""

    code: ctypes.CDLL
    layer: CLayer
    dtype: torch.dtype  # of all arrays
    threads: int
    shape: tuple[int, ...]  # of the output
    tile_rows: int  # of packed weights
    sizes: dict[str, int]  # the number of values of each array

    def run(self, function: str, **arguments: torch.Tensor | int | None) -> None:
        """Call a function of native.c in all threads; Python's global lock is released meanwhile.

        `arguments` are those between the layer and the number of threads, in order. A tensor that C could not read or
        write, or would read or write past its end, raises ValueError.
        """
        values = []
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                values.append(ctypes.c_void_p(None) if value is None else ctypes.c_long(value))
                continue
            size, held = self.sizes[name], value.untyped_storage().nbytes()
            fits = value.dtype == self.dtype and value.numel() == size and value.is_contiguous()
            if not fits or value.device.type != "cpu" or held < value.nbytes:
                raise ValueError(
                    f"conv_strategy 'native' takes {size} contiguous values of {self.dtype} on the CPU as {name}, "
                    f"not {list(value.shape)} of {value.dtype} on {value.device}, strides {value.stride()}, "
                    f"{held} bytes of memory: use 'auto', or move and cast a model before `fuse`"
                )
            values.append(ctypes.c_void_p(value.data_ptr()))
        status = getattr(self.code, function)(ctypes.byref(self.layer), *values, ctypes.c_long(self.threads))
        if status:
            size, rows = self.layer.kernel_size, f"{self.layer.images} x {self.layer.rows} rows"
            raise MemoryError(f"native.c has no memory for chunks of {rows}, or no kernels of {size} x {size} pixels")


@lru_cache(maxsize=1024)
def _call(
    kernel: str, dtype: torch.dtype, out_fields: int, stride: int, dilation: int, shape: tuple[int, ...], threads: int
) -> _Call:
    """The call for maps x of this shape, cut into chunks for the threads."""
    plan, code = _plan(kernel, dtype), library(dtype)
    batch, channels, height, width = shape
    in_fields = channels // plan.order
    if channels % plan.order or min(in_fields, out_fields, stride, dilation, height, width) < 1:
        raise ValueError(
            f"a convolution of {kernel!r} takes fields [B, fields * {plan.order}, H, W] of at least 1 x 1 pixels, "
            f"stride and dilation of at least 1, but got {list(shape)}, {stride} and {dilation}"
        )
    out_height, out_width = ((size - 1) // stride + 1 for size in (height, width))
    out_shape = (batch, out_fields * plan.order, out_height, out_width)
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
    layer = CLayer(in_fields=in_fields, out_fields=out_fields, **plan.fields, **geometry)
    pairs = in_fields * out_fields
    sizes = dict.fromkeys(("x", "dx"), math.prod(shape)) | dict.fromkeys(("y", "dy", "shortcut"), math.prod(out_shape))
    sizes |= {"weight": pairs * layer.n_basis, "weights": pairs * layer.n_entries, "dw": pairs * layer.n_entries}
    sizes |= {"packed": code.packed_size(ctypes.byref(layer), ctypes.c_long(0)), "bias": out_fields}
    sizes["sums"] = threads * code.sums_size(ctypes.byref(layer))
    return _Call(code, layer, dtype, threads, out_shape, code.tile_rows(), sizes)
