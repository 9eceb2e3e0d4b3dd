"""Steerable convolution in the irreps basis, where it is block diagonal: the same output, with fewer products.

    T = P * f             to the irreps basis, through the functions of the plane: one filter for all fields
    y^[k] = W[k] T[k]     block by block
    y = Q^T y^            back to regular fields

`irreps_basis.py` derives it, `basis.lifting_filter` is P, and the matrices W hold the learnt coefficients.
`native.c` is this algorithm, a few pixels at a time.
"""

import math

import torch
import torch.nn.functional as F

from equivision_timm.layers.strategies.basis import basis_for, block_shapes, block_weights
from equivision_timm.layers.strategies.contract import Layer, Strategy, register

__all__ = ["BlockDiagonal"]


@register
class BlockDiagonal(Strategy):
    name = "block_diagonal"

    def supports(self, layer: Layer) -> str | None:
        if layer.kernel.input_type != "regular":
            return f"it needs regular fields, but the input of this layer is {layer.kernel.input_type}"
        return None

    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        batch, _, height, width = x.shape
        name, blocks = layer.kernel.name, block_shapes(layer.kernel.name)
        shapes = [(size, n, size) for _, n, size in blocks]
        weights = block_weights(weight, name).to(layer.dtype).split([math.prod(shape) for shape in shapes])
        lifting = basis_for(weight, name, "lifting").to(layer.dtype)
        fourier = basis_for(weight, name, "fourier").to(layer.dtype)
        fields = x.reshape(batch * layer.in_fields, layer.order, height, width)  # from [B, I * |G|, H, W]
        t = F.conv2d(fields, lifting, None, layer.stride, layer.padding, layer.dilation)  # T = P * f
        t = t.unflatten(0, (batch, layer.in_fields))  # [B, I, rows, H', W']
        parts = t.split([math.prod(shape) for shape in blocks], 2)
        rows = []
        for w, shape, part, copies in zip(weights, shapes, parts, blocks, strict=True):
            w = w.unflatten(0, shape)  # W[k]: [size (row), n, size (column), O, I]
            own = part.unflatten(2, copies)  # T[k]: [B, I, copies, n, size, H', W']
            rows.append(torch.einsum("rnsoi,bicnshw->crobhw", w, own).flatten(0, 1))  # y^[k] = W[k] T[k]
        y = torch.einsum("rg,robhw->boghw", fourier, torch.cat(rows))  # y = Q^T y^: [B, O, |G|, H', W']
        return y.flatten(1, 2)  # [B, O * |G|, H', W']
