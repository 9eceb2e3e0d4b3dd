"""Steerable convolution in the irreps basis, where it is block diagonal: the same output, with fewer products.

    T = P * f             to the irreps basis, through the functions of the plane: one filter for all fields
    y^[k] = W[k] T[k]     block by block
    y = Q^T y^            back to regular fields

`irreps_basis.py` derives it, `basis.lifting_filter` is P, and the matrices W hold the learnt coefficients.
The filters W are |G| times smaller than the dense one. `native.c` is this algorithm, a few pixels at a time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from equivision_timm.layers.strategies.basis import basis_for, block_counts, block_shapes
from equivision_timm.layers.strategies.contract import Layer, Strategy, finish, register

__all__ = ["BlockDiagonal", "block_weights"]


def block_weights(weight: torch.Tensor, kernel: str) -> torch.Tensor:
    """W [entries, O, I], for each block [size (row), n, size (column), O, I] flattened; differentiable.

    Args:
        weight: w [O, I, n_basis, 1].
        kernel: name of the kernels, for regular input.
    """
    coefficients = basis_for(weight, kernel, "blocks")
    w = weight.flatten(0, 1).squeeze(-1)  # [O * I, n_basis]
    entries = coefficients.T @ w.T  # W = sum_b w_b coefficients_b: [entries, O * I]
    return entries.reshape(-1, weight.shape[0], weight.shape[1])  # [entries, O, I]


@dataclass(frozen=True)
class _Packed:
    """What `infer` takes: of each block W [size (row), n, size (column), O, I]; the bias [O] or None; P and Q."""

    blocks: list[torch.Tensor]
    bias: torch.Tensor | None
    lifting: torch.Tensor
    fourier: torch.Tensor


@register
class BlockDiagonal(Strategy):
    name = "block_diagonal"

    def supports(self, layer: Layer) -> str | None:
        if layer.kernel.input_type != "regular":
            return f"it needs regular fields, but the input of this layer is {layer.kernel.input_type}"
        return None

    def estimate(self, layer: Layer, shape: tuple[int, ...]) -> float:
        """For the trivial group, without blocks, it is no choice."""
        if layer.device.type != "cpu" or layer.order == 1:
            return math.inf
        batch, channels, height, width = shape
        out_height, out_width = layer.out_size(height, width)
        pixels, per_pair, rows = batch * out_height * out_width, *block_counts(layer.kernel.name)
        weights, lifted = layer.in_fields * layer.out_fields * per_pair, pixels * layer.in_fields * rows
        products = pixels * weights + lifted * layer.order * layer.kernel.size**2
        values = batch * channels * height * width + pixels * layer.out_fields * layer.order
        return products / 37e9 + 3.4e-9 * lifted + 1.8e-9 * values + 2.5e-9 * weights

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, layer: Layer) -> _Packed:
        shapes = [(size, n, size) for _, n, size in block_shapes(layer.kernel.name)]
        w = block_weights(weight, layer.kernel.name).to(layer.dtype)
        parts = w.split([math.prod(shape) for shape in shapes])
        blocks = [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
        constants = [basis_for(w, layer.kernel.name, form) for form in ("lifting", "fourier")]
        return _Packed(blocks, None if bias is None else bias.to(layer.dtype), *constants)

    def infer(
        self,
        x: torch.Tensor,
        packed: _Packed,
        layer: Layer,
        shortcut: torch.Tensor | None = None,
        relu: bool = False,
    ) -> torch.Tensor:
        batch, _, height, width = x.shape
        fields = x.reshape(batch * layer.in_fields, layer.order, height, width)  # from [B, I * |G|, H, W]
        t = F.conv2d(fields, packed.lifting, None, layer.stride, layer.padding, layer.dilation)  # T = P * f
        t = t.unflatten(0, (batch, layer.in_fields))  # [B, I, rows, H', W']
        shapes = block_shapes(layer.kernel.name)
        parts, y = t.split([math.prod(shape) for shape in shapes], 2), []
        for w, shape, part in zip(packed.blocks, shapes, parts, strict=True):
            own = part.unflatten(2, shape)  # T[k]: [B, I, copies, n, size, H', W']
            y.append(torch.einsum("rnsoi,bicnshw->crobhw", w, own).flatten(0, 1))  # y^[k] = W[k] T[k]
        y = torch.einsum("rg,robhw->boghw", packed.fourier, torch.cat(y))  # y = Q^T y^: [B, O, |G|, H', W']
        if packed.bias is not None:
            y = y + packed.bias[:, None, None, None]
        return finish(y.flatten(1, 2), shortcut, relu)  # [B, O * |G|, H', W']
