"""Steerable convolution in the irreps basis, block diagonal there: the same output, up to 14 times fewer products.

    f^ = Q f                  to the irreps basis, field by field
    S[j] = phi_j * f^         3x3 only: filter with the functions of the plane, see `steer.py`
    T = A S                   3x3 only: products of irreps
    y^[k] = W[k] T[k]         block by block, many pixels at once
    y = Q^T y^

`kernel_bases/irreps_basis.py` derives it; the matrices W hold the learnt coefficients (`block_weights`). A few images
are worked on at a time, so that what lies between two steps stays in the cache and memory does not grow with the batch;
the backward pass computes T again instead of keeping it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from equivision_timm.constants import constant
from equivision_timm.kernel_bases import Kernel, load_irreps_basis
from equivision_timm.layers.conv_strategies.expand import finish
from equivision_timm.layers.conv_strategies.irreps import operator
from equivision_timm.layers.conv_strategies.pieces import Piece, by_pieces
from equivision_timm.layers.conv_strategies.steer import Grid, Steps, Terms

__all__ = ["Packed", "conv2d", "infer", "pack"]


@dataclass(frozen=True)
class Packed:
    """What `infer` takes: for each block the matrix W [size * O, n * size * I]; the bias [O] or None."""

    matrices: list[torch.Tensor]
    bias: torch.Tensor | None


def pack(weights: torch.Tensor, bias: torch.Tensor | None, group: str, kernel_size: int) -> Packed:
    """`block_weights`, and the bias [O] of each field or None, for `infer`."""
    shapes = load_irreps_basis(Kernel(group, kernel_size)).shapes
    matrices = []
    for part, shape in zip(weights.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        matrix = part.unflatten(0, shape).permute(0, 3, 1, 2, 4)  # [size (row), O, n, size (column), I]
        matrices.append(matrix.flatten(2).flatten(0, 1))  # [size * O, n * size * I]
    return Packed(matrices, bias)


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
    matrices, bias = packed.matrices, packed.bias
    plan, grid, out_fields, share_out = _layer(x, matrices, group, kernel_size, stride, dilation)
    y = x.new_empty(len(x), out_fields * plan.order, grid.out_height, grid.out_width)

    def convolve(share: list[tuple[Piece, _Workspace]]) -> None:
        for (images, own), work in share:
            for _, first, matrix, rows, out in work.blocks(matrices, work.load(grid.rows(x[images], own))):
                if first == 0:
                    torch.bmm(matrix.expand(len(rows), -1, -1), rows, out=out)  # y^ = W T
                else:
                    out.baddbmm_(matrix.expand(len(rows), -1, -1), rows)
            if bias is not None:  # the same for all elements: in the trivial irrep alone, sqrt(|G|) times
                work.out_irreps[0].view(out_fields, -1).add_(bias[:, None], alpha=math.sqrt(plan.order))
            torch.mm(plan.fourier.T, work.out_irreps, out=work.out_regular.flatten(1))  # y = Q^T y^
            valid = work.out_regular[..., : work.grid.out_height, : grid.out_width].permute(2, 1, 0, 3, 4)
            y[images, :, own].unflatten(1, (out_fields, plan.order)).copy_(valid)  # [n, O, |G|, rows, width']

    share_out(convolve)
    return finish(y, shortcut, relu)


def _forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    group: str,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> torch.Tensor:
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
    matrices = pack(weights, None, group, kernel_size).matrices
    plan, grid, out_fields, share_out = _layer(x, matrices, group, kernel_size, stride, dilation)
    dx = x.new_zeros(x.shape) if for_x else None
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32

    def differentiate(share: list[tuple[Piece, _Workspace]]) -> list[torch.Tensor]:
        dw = [torch.zeros_like(matrix, dtype=sums) for matrix in matrices if for_weights]
        for (images, own), work in share:
            fields = grad[images, :, own].unflatten(1, (out_fields, plan.order)).permute(2, 1, 0, 3, 4)  # [|G|, O, ...]
            work.out_regular[..., : work.grid.out_height, : grid.out_width] = fields
            work.out_regular[..., work.grid.out_height :, :] = 0
            work.out_regular[..., grid.out_width :] = 0
            torch.mm(plan.fourier, work.out_regular.flatten(1), out=work.out_irreps)  # dy^ = Q dy
            t = work.load(grid.rows(x[images], own))
            for k, first, matrix, rows, out in work.blocks(matrices, t):
                if for_weights:  # dW = dy^ T^T, over the copies
                    dw[k][:, first : first + rows.shape[1]] += torch.bmm(out, rows.mT).sum(0)
                if for_x:  # T has served: dT = W^T dy^ takes its place
                    torch.bmm(matrix.mT.expand(len(rows), -1, -1), out, out=rows)
            if for_x:
                work.unload(t, grid.rows(dx[images], own))
        return dw

    shares = share_out(differentiate)
    gradients = [dx] if for_x else []
    if for_weights:
        shapes = load_irreps_basis(Kernel(group, kernel_size)).shapes
        dw = weights.new_empty(weights.shape)
        parts = dw.split([math.prod(shape) for shape in shapes])
        for part, (size, n, _), *own in zip(parts, shapes, *shares, strict=True):
            matrix = sum(own).unflatten(1, (n, size, -1)).unflatten(0, (size, -1))  # [size (row), O, n, size, I]
            part.unflatten(0, (size, n, size)).copy_(matrix.permute(0, 2, 3, 1, 4))
        gradients.append(dw)
    return gradients


conv2d = operator("block_diagonal_conv2d", _forward, _backward)


@dataclass(frozen=True)
class _Set:
    """A `FunctionSet` in the type and on the device of the images: n functions, their terms, A or None."""

    terms: list[Terms]
    product: torch.Tensor | None

    @property
    def n(self) -> int:
        return len(self.terms)

    @property
    def is_delta(self) -> bool:
        """One function, 1 in the middle and 0 elsewhere: nothing to filter."""
        return self.terms == [[(0, 0, 1.0)]]


@dataclass(frozen=True)
class _Plan:
    """What the group and the kernel size determine, in the type and on the device of the images."""

    fourier: torch.Tensor  # Q [|G|, |G|]
    blocks: list[tuple[int, int, int]]  # (size, copies, first row)
    sets: list[_Set]

    @property
    def order(self) -> int:
        return len(self.fourier)


@constant
def _plan(group: str, kernel_size: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    basis = load_irreps_basis(Kernel(group, kernel_size))
    sets = []
    for functions in basis.sets:
        terms = [[(a, b, term[a, b].item()) for a, b in term.nonzero().tolist()] for term in functions.terms]
        product = None if functions.product is None else functions.product.to(device, dtype)
        sets.append(_Set(terms, product))
    blocks, row = [], 0
    for size, copies in basis.blocks:
        blocks.append((size, copies, row))
        row += size * copies
    return _Plan(basis.fourier.to(device, dtype), blocks, sets)


class _Workspace:
    """The buffers for `n` images at a time and the steps between them; f^, S and T as in the head of the file.

    Rows of |G| channels come first, [|G|, fields, n, height, width] with the zeros of `Grid`, so that every step is
    one matrix product or one addition on long stretches of memory.
    """

    def __init__(self, plan: _Plan, grid: Grid, like: torch.Tensor, in_fields: int, out_fields: int, n: int) -> None:
        self.plan, self.grid, self.n = plan, grid, n
        self.in_fields, self.out_fields = in_fields, out_fields
        self.phases = [(f, g) for f in grid.phases for g in grid.phases]
        pixels = n * grid.height * grid.width
        self.total = plan.order * in_fields * pixels
        self.regular = {
            phase: _zeros_behind(like.new_empty(plan.order, in_fields, n, grid.height, grid.width), grid, *phase)
            for phase in self.phases
        }
        self.planes = {phase: self._buffer(like, self.total) for phase in self.phases}  # f^
        self.steered = [i for i, functions in enumerate(plan.sets) if not functions.is_delta]
        self.functions = sum(plan.sets[i].n for i in self.steered)
        self.filtered = self._buffer(like, self.functions * self.total)  # S
        self.products = [
            None if functions.product is None else like.new_empty(plan.order * functions.n, self.total // plan.order)
            for functions in plan.sets
        ]
        self.out_irreps = like.new_empty(plan.order, out_fields * pixels)  # y^
        self.out_regular = like.new_empty(plan.order, out_fields, n, grid.height, grid.width)  # y

    def _buffer(self, like: torch.Tensor, numbers: int) -> torch.Tensor:
        """[margin + numbers + margin], zero in the margins."""
        buffer = like.new_empty(numbers + 2 * self.grid.margin)
        buffer[: self.grid.margin] = 0
        buffer[len(buffer) - self.grid.margin :] = 0
        return buffer

    def _inner(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.grid.margin : len(buffer) - self.grid.margin]

    def _filtered_rows(self) -> list[torch.Tensor]:
        """S of each set that is steered: [n * |G|, I * pixels], rows (j, s)."""
        rows = self._inner(self.filtered).view(self.functions * self.plan.order, -1)
        return list(rows.split([self.plan.sets[i].n * self.plan.order for i in self.steered]))

    def _terms(self) -> list[Terms]:
        return [term for i in self.steered for term in self.plan.sets[i].terms]

    @cached_property
    def _steer(self) -> Steps:
        if not self.steered:
            return []
        return self.grid.steer(self.planes, self._terms(), list(self._inner(self.filtered).view(self.functions, -1)))

    @cached_property
    def _steer_transposed(self) -> Steps:
        if not self.steered:
            return []
        inner = {phase: self._inner(plane) for phase, plane in self.planes.items()}
        return self.grid.steer_transposed(self.filtered, self._terms(), inner)

    def load(self, x: torch.Tensor) -> list[torch.Tensor]:
        """T of x [n, I * |G|, H, W]: for each set [|G| * n_functions, I * pixels], rows (block, copy, j, row)."""
        plan, grid = self.plan, self.grid
        fields = x.unflatten(1, (self.in_fields, plan.order)).permute(2, 1, 0, 3, 4)  # [|G|, I, n, H, W]
        for phase in self.phases:
            source = grid.plane(fields, *phase)
            self.regular[phase][..., : source.shape[-2], : source.shape[-1]] = source
            irreps = self._inner(self.planes[phase]).view(plan.order, -1)
            torch.mm(plan.fourier, self.regular[phase].flatten(1), out=irreps)  # f^ = Q f
        for step in self._steer:
            step()
        rows = iter(self._filtered_rows() if self.steered else ())
        result = []
        for functions, product in zip(plan.sets, self.products, strict=True):
            if functions.is_delta:
                result.append(self._inner(self.planes[0, 0]).view(plan.order, -1))
            elif functions.product is None:
                result.append(next(rows))
            else:
                result.append(torch.mm(functions.product, next(rows), out=product))  # T = A S
        return result

    def unload(self, grads: list[torch.Tensor], dx: torch.Tensor) -> None:
        """The transpose of `load`: the gradient of T -> dx [n, I * |G|, H, W], zero before. Overwrites S and f^."""
        plan, grid = self.plan, self.grid
        rows = iter(self._filtered_rows() if self.steered else ())
        for functions, grad in zip(plan.sets, grads, strict=True):
            if functions.is_delta:
                continue
            if functions.product is None:
                next(rows).copy_(grad)
            else:
                torch.mm(functions.product.T, grad, out=next(rows))
        inner = {phase: self._inner(self.planes[phase]) for phase in self.phases}
        for phase in self.phases:
            if phase != (0, 0):  # that one is T of the function that is 1 in the middle, and holds its gradient
                inner[phase].zero_()
        for step in self._steer_transposed:
            step()
        fields = dx.unflatten(1, (self.in_fields, plan.order)).permute(2, 1, 0, 3, 4)  # [|G|, I, n, H, W]
        for phase in self.phases:
            regular = self.regular[phase]
            torch.mm(plan.fourier.T, inner[phase].view(plan.order, -1), out=regular.flatten(1))
            target = grid.plane(fields, *phase)
            target.copy_(regular[..., : target.shape[-2], : target.shape[-1]])
            _zeros_behind(regular, grid, *phase)  # as `load` expects them

    def blocks(self, matrices: list[torch.Tensor], t: list[torch.Tensor]) -> Iterator[tuple]:
        """For each block k and each set: (k, first column in W[k], those columns of W[k], T, y^).

        T [copies, n * size * I, pixels] of the set; y^ [copies, size * O, pixels].
        """
        for k, (size, copies, row) in enumerate(self.plan.blocks):
            out = self.out_irreps[row : row + size * copies].view(copies, size * self.out_fields, -1)
            first = 0
            for functions, own in zip(self.plan.sets, t, strict=True):
                rows = own[row * functions.n : (row + size * copies) * functions.n]
                rows = rows.view(copies, functions.n * size * self.in_fields, -1)
                yield k, first, matrices[k][:, first : first + rows.shape[1]], rows, out
                first += rows.shape[1]


def _zeros_behind(maps: torch.Tensor, grid: Grid, f: int, g: int) -> torch.Tensor:
    """Zeros in maps [..., height, width] behind the pixels of plane (f, g)."""
    rows, columns = (len(range(phase, size, grid.stride)) for phase, size in ((f, grid.in_height), (g, grid.in_width)))
    maps[..., rows:, :] = 0
    maps[..., columns:] = 0
    return maps


def _layer(
    x: torch.Tensor, matrices: list[torch.Tensor], group: str, kernel_size: int, stride: int, dilation: int
) -> tuple[_Plan, Grid, int, Callable]:
    """What both passes need: the plan, the grid, O, and the function that shares work on the images of x out."""
    plan = _plan(group, kernel_size, x.dtype, x.device)
    grid = Grid(kernel_size, stride, dilation, x.shape[2], x.shape[3])
    in_fields, out_fields = x.shape[1] // plan.order, matrices[0].shape[0]

    def workspace(n: int, rows: int) -> _Workspace:
        return _Workspace(plan, grid.of_rows(rows), x, in_fields, out_fields, n)

    pieces = _pieces(grid, x, max(in_fields, out_fields) * plan.order)
    return plan, grid, out_fields, partial(by_pieces, make_workspace=workspace, pieces=pieces, device=x.device)


def _pieces(grid: Grid, x: torch.Tensor, channels: int) -> list[list[Piece]]:
    """What to work on at a time: on the CPU what its caches hold, about 600000 numbers of the wider side.

    Some images each; or, for 1x1, some rows of one image. The rows of an image stay together.
    """
    batch, height, pixels = len(x), grid.out_height, grid.out_height * grid.out_width
    if x.device.type != "cpu":
        return [[(slice(0, batch), slice(0, height))]] if batch else []
    at_once = min(max(1568, 600_000 // channels), 4096)  # pixels
    images = max(1, at_once // pixels)
    rows = height if grid.kernel_size > 1 else max(1, min(height, at_once // grid.out_width))
    return [
        [(slice(i, min(i + images, batch)), slice(r, min(r + rows, height))) for r in range(0, height, rows)]
        for i in range(0, batch, images)
    ]
