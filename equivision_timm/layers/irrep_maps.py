"""Maps in the irreps basis of the left-right reflection, d1: depthwise convolution, and the change to regular fields.

A map of tokens is [B, 2 * fields, H, W]: first the symmetric channels, then the antisymmetric ones, which the
reflection negates. These are the layers of flopping-for-flops (Bökman et al., arXiv 2502.05169).
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from equivision_timm.layers.irreps import ChangeBasis, Device, DType

__all__ = ["MirrorDepthwiseConv2d", "OnTokens"]


class MirrorDepthwiseConv2d(nn.Module):
    """Depthwise convolution of tokens of d1, half of whose channels change between the irreps: the same shape.

    Inputs s1 s2 (symmetric) and a1 a2 become symmetric outputs S s1, A a1 and antisymmetric ones A s2, S a2, where the
    filters S are symmetric and A antisymmetric.

    Parameters: `weight` [2 * fields, 1, k, (k + 1) / 2], the left half of the filters with their centre, which A does
    not use; `bias` [fields] of the symmetric channels.

    `fields` must be even, `kernel_size` odd.
    """

    def __init__(
        self, fields: int, kernel_size: int, bias: bool = True, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        if fields % 2 or kernel_size % 2 == 0:
            raise ValueError(f"{fields} fields and kernel_size {kernel_size}: use an even number, and an odd kernel")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fields = fields
        self.weight: nn.Parameter = nn.Parameter(torch.empty(2 * fields, 1, kernel_size, kernel_size // 2 + 1, **dd))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(fields, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, zero bias."""
        trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def filter(self) -> torch.Tensor:
        """The filters [2 * fields, 1, k, k] in the order of the outputs: S, A, A, S."""
        s1, a1, a2, s2 = self.weight.chunk(4)
        symmetric, antisymmetric = torch.cat([s1, s2]), torch.cat([a1, a2])[..., :-1]
        whole = torch.cat([symmetric, symmetric[..., :-1].flip(-1)], -1)
        zero = torch.zeros_like(whole[..., :1])
        s1, s2 = whole.chunk(2)
        a1, a2 = torch.cat([antisymmetric, zero, -antisymmetric.flip(-1)], -1).chunk(2)
        return torch.cat([s1, a1, a2, s2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s1, s2, a1, a2 = x.chunk(4, 1)
        bias = None if self.bias is None else F.pad(self.bias, [0, self.fields])
        padding = self.weight.shape[2] // 2
        return F.conv2d(torch.cat([s1, a1, s2, a2], 1), self.filter(), bias, padding=padding, groups=2 * self.fields)


class OnTokens(nn.Module):
    """`inner`, which takes tokens [B, H, W, |G| * fields], on regular fields [B, fields * |G|, H, W]."""

    def __init__(self, inner: nn.Module, group: str) -> None:
        super().__init__()
        self.inner = inner
        self.to_irreps: ChangeBasis = ChangeBasis(group, "irreps")
        self.to_regular: ChangeBasis = ChangeBasis(group, "regular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.to_irreps(x.permute(0, 2, 3, 1)))  # [B, H, W, |G| * fields]
        return self.to_regular(x).permute(0, 3, 1, 2)
