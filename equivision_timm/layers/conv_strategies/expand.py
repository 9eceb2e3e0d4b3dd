"""The definition of a steerable convolution: expand the coefficients into a dense filter, then convolve.

    K[o, g, i, h](x) = sum_b w[o, i, b] basis[b, g, h](x)

w: the learnt coefficients, from input field i to output field o; basis: the equivariant kernels of
`kernel_bases/basis.py`, from element h of the input field to element g of the output field.
"""

import torch
import torch.nn.functional as F

from equivision_timm.layers.conv_strategies.basis import basis_for
from equivision_timm.layers.conv_strategies.context import leaves_python, needs_plain_operations

__all__ = ["conv2d", "dense_filter", "expand_filter", "finish", "infer", "pack"]

Packed = tuple[torch.Tensor, torch.Tensor | None]  # the filter; the bias [O * |G|] or None


def expand_filter(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The dense filter [O * |G|, I * H, k, k] of a steerable convolution; channels-last in memory.

    Args:
        weight: w [O, I, n_basis, 1], O output fields, I input fields.
        basis: [n_basis, |G|, H, k, k], H = |G| for regular input, 1 for trivial input.
    """
    _, order, h, k, _ = basis.shape
    out_fields, in_fields = weight.shape[:2]
    filters = basis.flatten(1).transpose(0, 1) @ weight.squeeze(-1).transpose(1, 2)  # K = sum_b basis_b w_b
    filters = filters.reshape(out_fields, order, h, k, k, in_fields)  # from [O, |G| * H * k * k, I]
    filters = filters.permute(0, 1, 3, 4, 5, 2)  # [O, |G|, k, k, I, H]
    filters = filters.reshape(out_fields * order, k, k, in_fields * h)  # [O * |G|, k, k, I * H]
    return filters.permute(0, 3, 1, 2)


def dense_filter(weight: torch.Tensor, group: str, kernel_size: int, input_type: str) -> torch.Tensor:
    """`expand_filter` with the basis of `group`, exact in the type and on the device of `weight`."""
    return expand_filter(weight, basis_for(weight, group, kernel_size, input_type))


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
    if bias is not None:
        bias = bias.repeat_interleave(len(filters) // len(bias))
    return filters.contiguous(memory_format=_memory_format(filters)), bias


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
    x = x.contiguous(memory_format=_memory_format(x))
    return finish(F.conv2d(x, *packed, stride, padding, dilation), shortcut, relu)


def finish(y: torch.Tensor, shortcut: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """y + shortcut, if there is one, with ReLU, if `relu`; overwrites y."""
    y = y if shortcut is None else y.add_(shortcut)
    return F.relu(y, inplace=True) if relu else y


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """What PyTorch convolves faster: on the CPU channels-last; elsewhere nothing has been measured."""
    on_cpu = tensor.device.type == "cpu" and not leaves_python() and not needs_plain_operations(tensor)
    return torch.channels_last if on_cpu else torch.contiguous_format
