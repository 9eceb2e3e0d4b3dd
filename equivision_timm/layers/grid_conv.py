"""Convolutions with free filters on the pixels: of whole patches and depthwise, on regular fields or irreps of d1.

For groups that map the pixel grid onto itself, an element g moves the pixels of a filter, g.w, whatever its size, even
ones included. With these,

    K[(o, g), (i, h)] = g . w[o, i, g^-1 h]      maps regular fields i to o, K[(o, g), i] = g . w[o, i] an image,
    K[(f, g)] = g . w[f]                         is depthwise: each element of a field has its own moved filter,

channels (field, element). Rotations by other angles do not map 2 x 2 pixels onto themselves: there cos 2 phi vanishes.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import Group, move_pixels
from equivision_timm.layers.conv import constant_conv, is_watched
from equivision_timm.layers.irreps import irreps_of

__all__ = ["DepthwiseConv2d", "MirrorDepthwiseConv2d", "PatchConv2d"]


class _FreeFilters(nn.Module):
    """Parameters `weight` of `shape` and `bias` [fields]."""

    def __init__(self, shape: tuple[int, int, int, int], fields: int, bias: bool, **dd: Any) -> None:
        super().__init__()
        self.fields = fields
        self.weight: nn.Parameter = nn.Parameter(torch.empty(shape, **dd))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(fields, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, zero bias."""
        trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _GridConv2d(_FreeFilters):
    """To regular fields, from regular ones or other channels. Parameter: `weight` [fields, channels, k, k]."""

    def __init__(
        self, channels: int, fields: int, kernel_size: int, group: str, regular: bool, bias: bool, **dd: Any
    ) -> None:
        super().__init__((fields, channels, kernel_size, kernel_size), fields, bias, **dd)
        self.kernel_size = kernel_size
        self.group = group
        self.order: int = irreps_of(group).order
        self.elements: int = self.order if regular else 1  # of an input field
        self.stride: int = 1
        self.padding: int = 0
        self.conv_groups: int = 1
        self._pixels = _moved_pixels(group, kernel_size, regular, torch.int64, torch.device("cpu"))  # for TorchScript

    def filter(self) -> torch.Tensor:
        """The dense filter [fields * |G|, channels, k, k], channel = field * |G| + element."""
        E, k = self.elements, self.kernel_size
        pixels = self._pixels.to(self.weight.device) if torch.jit.is_scripting() else self._moved_pixels()
        moved = self.weight.reshape(-1, E * k * k).index_select(1, pixels)  # [fields * n, |G| * E * k * k]
        moved = moved.view(self.fields, -1, self.order, E, k, k).transpose(1, 2)  # [fields, |G|, n, E, k, k]
        return moved.reshape(self.fields * self.order, -1, k, k)

    @torch.jit.unused
    def _moved_pixels(self) -> torch.Tensor:
        return constant_like(self.weight, _moved_pixels, self.group, self.kernel_size, self.elements > 1)

    def field_bias(self) -> torch.Tensor | None:
        """The bias of each channel."""
        return None if self.bias is None else self.bias.repeat_interleave(self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.filter(), self.field_bias(), self.stride, self.padding, 1, self.conv_groups)

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The plain convolution that computes the same, or itself if watched; for timm's `reparameterize_model`."""
        return self if is_watched(self) else self.dense_conv()

    @torch.no_grad()
    def dense_conv(self) -> nn.Conv2d:
        """The plain convolution with constant filters."""
        steps = {"stride": self.stride, "padding": self.padding}
        return constant_conv(self.filter(), self.field_bias(), self.conv_groups, **steps).train(self.training)

    def extra_repr(self) -> str:
        return f"fields={self.fields}, kernel_size={self.kernel_size}, group={self.group!r}"


@constant
def _moved_pixels(group: str, size: int, regular: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For each entry of g . w[g^-1 h], [|G|, elements, size, size] flat, its place in w [elements, size, size]."""
    parsed = Group.from_name(group)
    places = torch.arange((parsed.order if regular else 1) * size**2).view(-1, size, size)
    moved = []
    for g in range(parsed.order):
        sources = places[parsed.left_quotients()[g]] if regular else places
        moved.append(move_pixels(sources, parsed.quarter_turns(g) or 0, g >= parsed.rotations))
    return torch.stack(moved).flatten().to(device)


class PatchConv2d(_GridConv2d):
    """Convolution of whole patches, stride = kernel, to fields: [B, channels, H, W] -> [B, fields * |G|, H / k, W / k].

    Exactly equivariant if k divides H and W. `channels` are those of an image or, if `regular`, of regular fields.
    """

    def __init__(
        self, channels: int, fields: int, kernel_size: int, group: str, regular: bool, bias: bool = True, **dd: Any
    ) -> None:
        super().__init__(channels, fields, kernel_size, group, regular, bias, **dd)
        self.stride: int = kernel_size


class DepthwiseConv2d(_GridConv2d):
    """Depthwise convolution of regular fields, one free filter a field: [B, fields * |G|, H, W] -> the same shape."""

    def __init__(self, fields: int, kernel_size: int, group: str, bias: bool = True, **dd: Any) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} has no centre: use an odd one")
        super().__init__(1, fields, kernel_size, group, False, bias, **dd)
        self.padding: int = kernel_size // 2
        self.conv_groups: int = fields * self.order


class MirrorDepthwiseConv2d(_FreeFilters):
    """Depthwise convolution of irreps of d1, half of whose channels change between the irreps.

    Maps [B, 2 * fields, H, W] -> the same shape: first the symmetric channels, then the antisymmetric ones, which the
    reflection negates. Inputs s1 s2 (symmetric) and a1 a2 become symmetric outputs S s1, A a1 and antisymmetric ones
    A s2, S a2, where the filters S are symmetric and A antisymmetric: a layer of flopping-for-flops (Bökman et al.,
    arXiv 2502.05169).

    Parameters: `weight` [2 * fields, 1, k, (k + 1) / 2], the left half of the filters with their centre, which A does
    not use; `bias` [fields] of the symmetric channels.
    """

    def __init__(self, fields: int, kernel_size: int, bias: bool = True, **dd: Any) -> None:
        if fields % 2 or kernel_size % 2 == 0:
            raise ValueError(f"{fields} fields and kernel_size {kernel_size}: use an even number, and an odd kernel")
        super().__init__((2 * fields, 1, kernel_size, kernel_size // 2 + 1), fields, bias, **dd)

    def filter(self) -> torch.Tensor:
        """The filters [2 * fields, 1, k, k] in the order of the outputs: S, A, A, S."""
        s1, a1, a2, s2 = self.weight.chunk(4)
        s, a = torch.cat([s1, s2]), torch.cat([a1, a2])[..., :-1]
        s = torch.cat([s, s[..., :-1].flip(-1)], -1)
        a = torch.cat([a, torch.zeros_like(s[..., :1]), -a.flip(-1)], -1)
        s1, s2 = s.chunk(2)
        return torch.cat([s1, a, s2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s1, s2, a1, a2 = x.chunk(4, 1)
        bias = None if self.bias is None else F.pad(self.bias, [0, self.fields])
        padding = self.weight.shape[2] // 2
        return F.conv2d(torch.cat([s1, a1, s2, a2], 1), self.filter(), bias, padding=padding, groups=2 * self.fields)
