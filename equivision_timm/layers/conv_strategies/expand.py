"""The definition of a steerable convolution: expand the coefficients into a dense filter, then convolve.

    K[o, g, i, h](x) = sum_b w[o, i, b] basis[b, g, h](x)

w: the learnt coefficients, from input field i to output field o; basis: the equivariant kernels of
`kernel_bases/basis.py`, from element h of the input field to element g of the output field.
"""

import torch
import torch.nn.functional as F

__all__ = ["conv2d", "expand_filter"]


def expand_filter(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The dense filter [O * |G|, I * H, k, k] of a steerable convolution.

    Args:
        weight: w [O, I, n_basis, 1], O output fields, I input fields.
        basis: [n_basis, |G|, H, k, k], H = |G| for regular input, 1 for trivial input.
    """
    filters = weight.squeeze(-1) @ basis.flatten(1)  # K = sum_b w_b basis_b: [O, I, |G| * H * k * k]
    filters = filters.unflatten(-1, basis.shape[1:])  # [O, I, |G|, H, k, k]
    return filters.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [O, |G|, I, H, k, k] -> [O * |G|, I * H, k, k]


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, basis: torch.Tensor, stride: int, padding: int, dilation: int
) -> torch.Tensor:
    """Steerable convolution of x [B, I * H, height, width] by the expanded filter: [B, O * |G|, height', width']."""
    return F.conv2d(x, expand_filter(weight, basis), None, stride, padding, dilation)
