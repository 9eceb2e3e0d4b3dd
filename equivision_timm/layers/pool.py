"""Pooling: over the group, one number per field, unchanged by the group; and over neighbouring pixels."""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, register_notrace_module

from equivision_timm.layers.stock import is_stock, remember
from equivision_timm.layers.strategies.context import leaves_python, needs_plain_operations

__all__ = ["GroupPool", "InvariantPool", "MaxPool2d"]


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`, on the CPU always in the channels-last format, where PyTorch's kernel is several times faster."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        sizes = self.kernel_size, self.stride, self.padding  # integers: TorchScript knows no other type for both
        return _max_pool2d(input, *sizes)  # pyright: ignore[reportArgumentType]

    def fuse(self) -> nn.Module:
        """The stock layer, for deployment; called by timm's `reparameterize_model`."""
        if not is_stock(self, MaxPool2d):
            return self
        return nn.MaxPool2d(self.kernel_size, self.stride, self.padding).train(self.training)


remember(MaxPool2d)
register_notrace_module(MaxPool2d)  # one node where timm traces a model for its features


@torch.fx.wrap  # asks how the pixels lie in memory: one node in a graph of torch.fx
def _max_pool2d(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    if torch.jit.is_scripting():
        return F.max_pool2d(x, kernel_size, stride, padding)
    else:
        plain = leaves_python() or needs_plain_operations(x)
        if x.device.type != "cpu" or plain or x.is_contiguous(memory_format=torch.channels_last):
            return F.max_pool2d(x, kernel_size, stride, padding)
        x = x.contiguous(memory_format=torch.channels_last)
        return F.max_pool2d(x, kernel_size, stride, padding).contiguous()


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
