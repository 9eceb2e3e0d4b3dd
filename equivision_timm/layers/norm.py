"""Normalisation of fields: statistics and affine parameters shared over the group."""

from collections.abc import Callable

import torch
import torch.nn as nn

from equivision_timm.layers.stock import remember

__all__ = ["FieldNorm"]


class FieldNorm(nn.Module):
    """A stock 2-D normalisation applied to fields: [B, m * |G|, H, W] -> the same, statistics per field.

    The group axis counts as space, [B, m, |G| * H, W], so that a rotation, which permutes a field's channels, only
    permutes positions. With `nn.BatchNorm2d` this is escnn's `InnerBatchNorm`. The wrapped layer stays a stock one
    (`per_field`): tools that look for batch norms (sync, freeze, statistics) find it.

    Args:
        fields: m, the number of fields.
        order: |G|.
        norm_layer: makes the wrapped layer from a number of channels; must not depend on the positions.
        device: where to create the parameters.
        dtype: their type.
    """

    def __init__(
        self,
        fields: int,
        order: int,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fields = fields
        self.order = order
        self.per_field = norm_layer(fields, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        x = x.reshape(B, self.fields, self.order * H, W)  # [B, m * |G|, H, W] -> [B, m, |G| * H, W]
        return self.per_field(x).reshape(B, C, H, W)


remember(FieldNorm)
