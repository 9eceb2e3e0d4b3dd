"""Normalisation of fields: statistics and affine parameters shared over the group."""

from collections.abc import Callable

import torch
import torch.nn as nn

from equivision_timm.layers.field_batch_norm import field_batch_norm, field_batch_norm_by_definition, normalize
from equivision_timm.layers.stock import is_stock, no_global_hooks, remember
from equivision_timm.layers.strategies.context import leaves_python, needs_plain_operations

__all__ = ["FieldNorm"]


class FieldNorm(nn.Module):
    """A stock 2-D normalisation applied to fields: [B, m * |G|, H, W] -> the same, statistics per field.

    The group axis counts as space, [B, m, |G| * H, W], so that a rotation, which permutes a field's channels, only
    permutes positions. With `nn.BatchNorm2d` this is escnn's `InnerBatchNorm`. The wrapped layer stays a stock one
    (`per_field`): tools that look for batch norms (sync, freeze, statistics) find it. The output has the memory format
    of the input. A batch norm that nobody watches is computed by channel (`field_batch_norm.py`) where that is faster:
    in the channels-last format, and on other devices than the CPU.

    Args:
        fields: m, the number of fields.
        order: |G|.
        norm_layer: makes the wrapped layer from a number of channels; must not depend on the positions.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: in training, a batch norm meets fields of one value.
    """

    def __init__(
        self,
        fields: int,
        order: int,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fields = fields
        self.order = order
        self.per_field: nn.Module = norm_layer(fields, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self._goes_by_channel(x):
            return self._batch_norm(x)
        B, C, H, W = x.shape
        fields = x.reshape(B, self.fields, self.order * H, W)  # [B, m * |G|, H, W] -> [B, m, |G| * H, W]
        y = self.per_field(fields).reshape(B, C, H, W)
        return y if torch.jit.is_scripting() else _as_it_lies(y, x)

    @torch.jit.unused
    def _goes_by_channel(self, x: torch.Tensor) -> bool:
        """Whether `per_field` is a batch norm as it was made, in a place where it is better by channel.

        It is faster so in the channels-last format and on other devices. With given statistics, a graph that leaves
        Python needs no reshape for it, and so stays open for images of every size.
        """
        norm = self.per_field
        if leaves_python():
            better = isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None
        elif not _asks_for_numbers(x) or not x.is_floating_point():
            better = False
        else:
            better = x.device.type != "cpu" or (_is_channels_last(x) and not torch.compiler.is_compiling())
        return better and self.order > 1 and no_global_hooks() and is_stock(norm, nn.BatchNorm2d)

    @torch.jit.unused
    def _batch_norm(self, x: torch.Tensor) -> torch.Tensor:
        """What the batch norm `per_field` makes of the fields, its running statistics included."""
        norm, dtype = self.per_field, torch.float64 if x.dtype == torch.float64 else torch.float32
        assert isinstance(norm, nn.BatchNorm2d)  # `_goes_by_channel`
        weight, bias = (None if t is None else t.to(dtype) for t in (norm.weight, norm.bias))
        if not norm.training and norm.running_mean is not None and norm.running_var is not None:
            mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
            return normalize(x, self.order, mean, var, weight, bias, norm.eps)
        values = x.numel() // self.fields
        if values == 1:
            raise ValueError(f"a batch norm in training needs more than one value for each field, but got {x.shape}")
        weight = x.new_ones(self.fields, dtype=dtype) if weight is None else weight
        bias = x.new_zeros(self.fields, dtype=dtype) if bias is None else bias
        by_channel = field_batch_norm_by_definition if torch.compiler.is_compiling() else field_batch_norm
        y, mean, var = by_channel(x, self.order, weight, bias, norm.eps)
        if norm.running_mean is not None:
            with torch.no_grad():
                _update(norm, mean.detach(), var.detach() * (values / (values - 1)))  # the unbiased variance
        return y


def _update(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor) -> None:
    """running <- (1 - momentum) running + momentum now; without momentum the mean of all batches so far."""
    assert norm.num_batches_tracked is not None  # as the running statistics are not
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype) if norm.momentum is None else norm.momentum
    for running, now in ((norm.running_mean, mean), (norm.running_var, var)):
        if running is not None:
            running.copy_(running + momentum * (now - running))


def _asks_for_numbers(x: torch.Tensor) -> bool:
    """Whether x is a tensor, and no proxy of torch.fx, in no graph that leaves Python, and under no transform."""
    return isinstance(x, torch.Tensor) and not leaves_python() and not needs_plain_operations(x)


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether x lies in the channels-last format, and in no other."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@torch.jit.unused
def _as_it_lies(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the memory format of x."""
    if not _asks_for_numbers(x) or not _is_channels_last(x):
        return y
    return y.contiguous(memory_format=torch.channels_last)


remember(FieldNorm)
