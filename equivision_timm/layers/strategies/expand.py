"""The definition of a steerable convolution: expand the coefficients into a dense filter, then convolve.

    K[o, g, i, h](x) = sum_b w[o, i, b] basis[b, g, h](x)

w: the learnt coefficients, from input field i to output field o; basis: the equivariant kernels of
`kernel_basis.py`, from element h of the input field to element g of the output field.
"""

import torch
import torch.nn.functional as F

from equivision_timm.layers.strategies.basis import basis_for
from equivision_timm.layers.strategies.contract import Layer, Strategy, register

__all__ = ["Expand", "dense_filter", "expand_filter"]


def expand_filter(weight: torch.Tensor, basis: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """The dense filter [O * |G|, I * H, k, k] of a steerable convolution.

    Args:
        weight: w [O, I, n_basis, 1], O output fields, I input fields.
        basis: [n_basis, |G|, H, k, k], H = |G| for regular input, 1 for trivial input.
        channels_last: whether the filter is in the channels-last format, else contiguous.
    """
    _, order, h, k, _ = basis.shape
    out_fields, in_fields = weight.shape[:2]
    filters = basis.flatten(1).transpose(0, 1) @ weight.squeeze(-1).transpose(1, 2)  # K = sum_b basis_b w_b
    filters = filters.reshape(out_fields, order, h, k, k, in_fields)  # from [O, |G| * H * k * k, I]
    if channels_last:
        filters = filters.permute(0, 1, 3, 4, 5, 2)  # [O, |G|, k, k, I, H]
        filters = filters.reshape(out_fields * order, k, k, in_fields * h)  # [O * |G|, k, k, I * H]
        return filters.permute(0, 3, 1, 2)
    filters = filters.permute(0, 1, 5, 2, 3, 4)  # [O, |G|, I, H, k, k]
    return filters.reshape(out_fields * order, in_fields * h, k, k).contiguous()


def dense_filter(weight: torch.Tensor, kernel: str, channels_last: bool = False) -> torch.Tensor:
    """`expand_filter` with the basis of the kernels of that name, exact in the type and on the device of `weight`."""
    return expand_filter(weight, basis_for(weight, kernel, "pixels"), channels_last)


@register
class Expand(Strategy):
    name = "expand"

    def supports(self, layer: Layer) -> None:
        return None

    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        last = layer.memory_format == torch.channels_last
        filters = dense_filter(weight, layer.kernel.name, last).to(layer.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return F.conv2d(x, filters, None, layer.stride, layer.padding, layer.dilation)
