"""Pooling over the group: one invariant channel for each field."""

import torch
import torch.nn as nn
from timm.layers import SelectAdaptivePool2d

from equivision_timm.errors import check_choice

__all__ = ["GroupPool", "InvariantPool"]


class GroupPool(nn.Module):
    """Reduces each regular field to one channel: [B, m * |G|, ...] -> [B, m, ...].

    The group permutes the channels of a field; their maximum or mean does not change.

    Args:
        order: |G|.
        pool_type: 'max', 'avg', or '' to keep the group axis (the identity).
    """

    def __init__(self, order: int, pool_type: str = "max") -> None:
        super().__init__()
        check_choice("group_pool", pool_type, ("max", "avg", ""))
        self.order = order
        self.pool_type = pool_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool_type == "":
            return x
        elements = [x[:, g :: self.order] for g in range(self.order)]  # of all fields: each [B, m, ...]
        fields = torch.stack(elements, 2)  # [B, m, |G|, ...]
        return fields.amax(2) if self.pool_type == "max" else fields.mean(2)

    def extra_repr(self) -> str:
        return f"order={self.order}, pool_type={self.pool_type!r}"


class InvariantPool(SelectAdaptivePool2d):
    """timm's pooling over space, then over the group: [B, m * |G|, H, W] -> [B, m], or [B, m, H, W] for `pool_type=''`.

    One module, so that a model without its last two children ends with the map, as timm's ResNets do.

    Args:
        pool_type: timm's: 'avg', 'max', 'avgmax', 'catavgmax', or '' to keep the map.
        order: |G|.
        group_pool: as in `GroupPool`.
    """

    def __init__(self, pool_type: str, order: int, group_pool: str) -> None:
        super().__init__(pool_type=pool_type, flatten=bool(pool_type))
        self.group_pool: GroupPool = GroupPool(order, group_pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group_pool(self.flatten(self.pool(x)))
