"""The definition of a steerable convolution: expand the coefficients into a dense filter, then convolve.

    K[o, g, i, h](x) = sum_b w[o, i, b] basis[b, g, h](x)

w: the learnt coefficients, from input field i to output field o; basis: the equivariant kernels of
`kernel_bases/basis.py`, from element h of the input field to element g of the output field.
"""

import torch
import torch.nn.functional as F

__all__ = ["conv2d", "expand_filter", "finish", "infer", "pack"]

Packed = tuple[torch.Tensor, torch.Tensor | None]  # the filter; the bias [O * |G|] or None


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
    x: torch.Tensor,
    filters: torch.Tensor,
    bias: torch.Tensor | None,
    group: str,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> torch.Tensor:
    """Steerable convolution of x [B, I * H, height, width] by `expand_filter`: [B, O * |G|, height', width'].

    Args:
        x: the input.
        filters: the dense filter.
        bias: [O], added to each field, or None.
        group: name of the group.
        kernel_size: k; the padding is dilation * (k // 2).
        stride: as in `nn.Conv2d`.
        dilation: as in `nn.Conv2d`.
    """
    return infer(x, pack(filters, bias, group, kernel_size), group, kernel_size, stride, dilation)


def pack(filters: torch.Tensor, bias: torch.Tensor | None, group: str, kernel_size: int) -> Packed:
    """The filter, and the bias [O] of each field or None, for `infer`."""
    return filters, bias if bias is None else bias.repeat_interleave(len(filters) // len(bias))


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
    """As `conv2d`; then `shortcut` is added, if there is one, and the output ends with ReLU, if `relu`."""
    padding = dilation * (kernel_size // 2)
    return finish(F.conv2d(x, *packed, stride, padding, dilation), shortcut, relu)


def finish(y: torch.Tensor, shortcut: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """y + shortcut, if there is one, with ReLU, if `relu`."""
    y = y if shortcut is None else y + shortcut
    return F.relu(y, inplace=True) if relu else y
