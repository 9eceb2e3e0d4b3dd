"""Steerable convolution: learns the coefficients of a frozen kernel basis, not the pixels of a filter."""

import math

import torch
import torch.nn as nn

from equivision_timm.groups import Group
from equivision_timm.kernel_bases import load_kernel_basis
from equivision_timm.layers.conv_strategies import expand

__all__ = ["SteerableConv2d"]


class SteerableConv2d(nn.Module):
    """Convolution from `in_fields` fields to `out_fields` regular fields that commutes with the group; no bias.

    Input [B, in_fields * H, height, width], H = |G| for regular, 1 for trivial input (an image); output
    [B, out_fields * |G|, height', width']; both field-major: channel = field * |G| + element. The padding is
    dilation * (kernel_size // 2): stride 1 keeps the size, stride 2 halves it, rounded up. Turns by 90 degrees and
    mirrors of the group are exact where stride 1 is used or height = width is odd; other elements up to resampling.
    A dilation spreads the taps of the same kernel, as in `nn.Conv2d`.

    `weight` has the shape [out_fields, in_fields, n_basis, 1]: two-dimensional and more, so that weight decay applies
    to it; the input second, so that timm can adapt it to other numbers of image channels; the last axis because a
    channels-last model takes 4-D parameters.

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        kernel_size: 1 or 3, or 7 for trivial input: the sizes for which bases are frozen.
        group: name of the group, for example 'c8'.
        input_type: 'regular' or 'trivial'.
        stride: as in `nn.Conv2d`.
        dilation: as in `nn.Conv2d`.
        device: where to create the parameters and buffers.
        dtype: their type.

    Raises:
        ValueError: unknown group, or no basis frozen for this kernel size and input type.

    Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019).
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        kernel_size: int,
        group: str,
        input_type: str = "regular",
        stride: int = 1,
        dilation: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.kernel_size = kernel_size
        self.group = group
        self.input_type = input_type
        self.stride = stride
        self.dilation = dilation
        self.padding = dilation * (kernel_size // 2)
        self.order = Group.from_name(group).order

        basis = load_kernel_basis(group, kernel_size, input_type)
        n_basis, _, inputs = basis.coefficients.shape
        self.weight = nn.Parameter(torch.empty(out_fields, in_fields, n_basis, 1, **dd))
        self.kernel_shape = [self.order, inputs, kernel_size, kernel_size]
        # Two axes instead of five: a channels-last model takes no 5-D buffers
        self.register_buffer("basis", torch.empty(n_basis, math.prod(self.kernel_shape), **dd), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the coefficients, w_b ~ N(0, he_std_b^2 / in_fields), and refill the basis."""
        he_std = load_kernel_basis(self.group, self.kernel_size, self.input_type).he_std
        std = (he_std / math.sqrt(self.in_fields)).to(self.weight)
        with torch.no_grad():
            self.weight.normal_().mul_(std[:, None])  # std over the axis of the basis
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Refill the basis, which no checkpoint carries (after `to_empty`, say)."""
        self.basis.copy_(load_kernel_basis(self.group, self.kernel_size, self.input_type).sample().flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        basis = self.basis.unflatten(1, self.kernel_shape)  # [n_basis, |G|, H, k, k]
        return expand.conv2d(x, self.weight, basis, self.stride, self.padding, self.dilation)

    def fuse(self) -> nn.Conv2d:
        """The plain convolution that computes the same, for deployment; called by timm's `reparameterize_model`."""
        filters = expand.expand_filter(self.weight, self.basis.unflatten(1, self.kernel_shape)).detach()
        conv = nn.Conv2d(
            filters.shape[1],
            filters.shape[0],
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=False,
            device="meta",
        )
        conv.weight = nn.Parameter(filters)
        return conv

    def extra_repr(self) -> str:
        return (
            f"{self.in_fields}, {self.out_fields}, kernel_size={self.kernel_size}, group={self.group!r}, "
            f"input_type={self.input_type!r}, stride={self.stride}, dilation={self.dilation}"
        )
