"""Pooling: over the group, one number per field, unchanged by the group; and over neighbouring pixels."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

__all__ = ["GroupPool", "MaxPool2d"]


@register_notrace_module  # asks how the pixels lie in memory
class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`, on the CPU always in the channels-last format, where PyTorch's kernel is several times faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convert = x.device.type == "cpu" and not x.is_contiguous(memory_format=torch.channels_last)
        if convert:
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
        return x.contiguous() if convert else x


class GroupPool(nn.Module):
    """Reduces each regular field to one channel: [B, m * |G|, ...] -> [B, m, ...].

    The group permutes the channels of a field; their maximum or mean does not change.

    Args:
        order: |G|.
        pool_type: 'max', 'avg', or '' to keep the group axis (the identity).

    Raises:
        ValueError: any other `pool_type`.
    """

    def __init__(self, order: int, pool_type: str = "max") -> None:
        super().__init__()
        if pool_type not in ("max", "avg", ""):
            raise ValueError(f"unknown group_pool {pool_type!r}: use 'max', 'avg', or '' to keep the group axis")
        self.order = order
        self.pool_type = pool_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool_type == "":
            return x
        fields = x.unflatten(1, (-1, self.order))  # [B, m, |G|, ...]
        return fields.amax(2) if self.pool_type == "max" else fields.mean(2)

    def extra_repr(self) -> str:
        return f"order={self.order}, pool_type={self.pool_type!r}"
