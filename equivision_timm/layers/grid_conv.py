"""Convolutions to regular fields with free filters on the pixels: whole patches, and depthwise.

For groups that map the pixel grid onto itself, an element g moves the pixels of a filter, g.w, whatever its size, even
ones included. With these,

    K[(o, g), (i, h)] = g . w[o, i, g^-1 h]      maps regular fields i to o, K[(o, g), i] = g . w[o, i] an image,
    K[(f, g)] = g . w[f]                         is depthwise: each element of a field has its own moved filter,

channels (field, element). Rotations by other angles do not map 2 x 2 pixels onto themselves: there cos 2 phi vanishes.
"""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import Group
from equivision_timm.layers.irreps import Device, DType, irreps_of

__all__ = ["DepthwiseConv2d", "PatchConv2d", "moved_pixels"]


@constant
def moved_pixels(group: str, kernel_size: int, regular: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The source of each entry of a filter moved by g, [|G| * k * k], or of a regular one, [|G| * |G| * k * k]; int64.

    Entry (g, p) is g^-1 p; entry (g, h, p) is (g^-1 h) * k * k + g^-1 p.
    """
    parsed = Group.from_name(group)
    pixels = torch.arange(kernel_size**2).view(kernel_size, kernel_size)
    moved = torch.stack([parsed.transform_image(pixels, g).flatten() for g in range(parsed.order)])  # [g, p]
    if regular:
        moved = parsed.left_quotients()[:, :, None] * kernel_size**2 + moved[:, None]  # [g, h, p]
    return moved.flatten().to(device)


@torch.fx.wrap  # reads the device of the weights: one node in a graph of torch.fx
def _moved(weight: torch.Tensor, group: str, kernel_size: int, regular: bool) -> torch.Tensor:
    """[fields, n, entries] -> [fields, n, |G|, entries]: the filters of all elements."""
    index = constant_like(weight, moved_pixels, group, kernel_size, regular)
    return weight.index_select(2, index).unflatten(2, (-1, weight.shape[2]))


class _GridConv2d(nn.Module):
    """Parameters `weight` [fields, n, k, k] and `bias` [fields], and the filters they stand for."""

    def __init__(
        self, shape: tuple[int, int, int], group: str, regular: bool, bias: bool, device: Device, dtype: DType
    ) -> None:
        super().__init__()
        self.group = group
        self.order: int = irreps_of(group).order  # refuses other groups
        self.fields, _, self.kernel_size = shape
        self.regular = regular
        self.weight: nn.Parameter = nn.Parameter(torch.empty(*shape, shape[2], device=device, dtype=dtype))
        self.bias: nn.Parameter | None = (
            nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        )
        self._index = moved_pixels(
            group, self.kernel_size, regular, torch.int64, torch.device("cpu")
        )  # for TorchScript
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, zero bias."""
        trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filter(self) -> torch.Tensor:
        """The dense filter [fields * |G|, channels, k, k], channel = field * |G| + element."""
        weight = self.weight.flatten(2)
        if self.regular:
            weight = weight.unflatten(1, (-1, self.order)).flatten(2)  # [fields, in_fields, |G| * k * k]
        if torch.jit.is_scripting():
            index = self._index.to(weight.device)
            moved = weight.index_select(2, index).unflatten(2, (-1, weight.shape[2]))
        else:
            moved = _moved(weight, self.group, self.kernel_size, self.regular)
        k = self.kernel_size  # [fields, n, |G|, |G| * k * k or k * k]
        return moved.transpose(1, 2).flatten(0, 1).flatten(1).unflatten(1, (-1, k, k))

    def field_bias(self) -> torch.Tensor | None:
        """The bias of each channel."""
        return None if self.bias is None else self.bias.repeat_interleave(self.order)

    def extra_repr(self) -> str:
        return f"fields={self.fields}, kernel_size={self.kernel_size}, group={self.group!r}"


class PatchConv2d(_GridConv2d):
    """Convolution of whole patches, stride = kernel, to fields: [B, channels, H, W] -> [B, fields * |G|, H / k, W / k].

    Exactly equivariant if k divides H and W.

    Args:
        channels: of the input: those of an image, or fields * |G|.
        fields: number of output fields.
        kernel_size: k, side of the patches.
        group: name of the group.
        regular: whether the input consists of regular fields.
        bias: whether there is one.
    """

    def __init__(
        self,
        channels: int,
        fields: int,
        kernel_size: int,
        group: str,
        regular: bool,
        bias: bool = True,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__((fields, channels, kernel_size), group, regular, bias, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.filter(), self.field_bias(), stride=self.kernel_size)


class DepthwiseConv2d(_GridConv2d):
    """Depthwise convolution of regular fields, one free filter a field: [B, fields * |G|, H, W] -> the same shape.

    Args:
        fields: number of fields.
        kernel_size: odd.
        group: name of the group.
        bias: whether there is one.
    """

    def __init__(
        self,
        fields: int,
        kernel_size: int,
        group: str,
        bias: bool = True,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__((fields, 1, kernel_size), group, False, bias, device, dtype)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} has no centre: use an odd one")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding, groups = self.kernel_size // 2, self.fields * self.order
        return F.conv2d(x, self.filter(), self.field_bias(), padding=padding, groups=groups)
