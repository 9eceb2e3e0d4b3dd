"""Normalisation of fields: statistics and affine parameters shared over the group."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.layers.field_batch_norm import field_batch_norm, field_batch_norm_by_definition, normalize
from equivision_timm.layers.strategies.context import is_channels_last, leaves_python, needs_plain_operations

__all__ = ["FieldBatchNorm2d", "FieldNorm"]


class FieldBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on fields, faster in two formats: [B, m, |G| * H, W] -> the same.

    A field is |G| channels, and its statistics follow from theirs (`field_batch_norm.py`). That reads channels-last
    maps where they are, and gives a GPU |G| times more channels at once. Contiguous maps on the CPU, graphs and
    transforms take PyTorch's own batch norm. Parameters, buffers and results are those of `nn.BatchNorm2d`.

    Args:
        fields: m, the number of fields.
        order: |G|.
        **kwargs: of `nn.BatchNorm2d`.
    """

    def __init__(self, fields: int, order: int, **kwargs) -> None:
        super().__init__(fields, **kwargs)
        self.order = order

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self._by_channel(input):
            return self._forward_by_channel(input)
        momentum, count = 0.0 if self.momentum is None else self.momentum, self.num_batches_tracked
        if self.training and count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if self.momentum is None else momentum
        stats = self.running_mean, self.running_var  # PyTorch's forward, since TorchScript does not support super()
        batch = self.training or self.running_mean is None
        return F.batch_norm(input, stats[0], stats[1], self.weight, self.bias, batch, momentum, self.eps)

    @torch.jit.unused
    def _by_channel(self, x: torch.Tensor) -> bool:
        """Whether x is on another device than the CPU, or channels-last, [pixels, m, |G|, 1]."""
        if leaves_python() or needs_plain_operations(x) or not x.is_floating_point() or self.order == 1:
            return False
        pixels = x.shape[2:] == (self.order, 1) and not torch.compiler.is_compiling()
        return x.device.type != "cpu" or pixels

    @torch.jit.unused
    def _forward_by_channel(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.reshape(x.shape[0], self.num_features * self.order, -1)  # of [B, m, |G| * L, 1]: [B, m * |G|, L]
        if not self.training and self.running_mean is not None:
            return self.normalize_channels(channels).view(x.shape)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = (None if t is None else t.to(dtype) for t in (self.weight, self.bias))
        values = x.numel() // self.num_features
        if values == 1:
            raise ValueError(f"a batch norm in training needs more than one value for each field, but got {x.shape}")
        weight = x.new_ones(self.num_features, dtype=dtype) if weight is None else weight
        bias = x.new_zeros(self.num_features, dtype=dtype) if bias is None else bias
        by_channel = field_batch_norm_by_definition if torch.compiler.is_compiling() else field_batch_norm
        y, mean, var = by_channel(channels, self.order, weight, bias, self.eps)
        if self.running_mean is not None:
            self._update(mean.detach(), var.detach() * (values / (values - 1)))  # the unbiased variance
        return y.view(x.shape)

    @torch.jit.unused
    def normalize_channels(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, m * |G|, ...] with the running statistics, in evaluation mode."""
        assert self.running_mean is not None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        return normalize(x, self.order, *(None if t is None else t.to(dtype) for t in given), self.eps)

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        """running <- (1 - momentum) running + momentum now; without momentum the mean of all batches so far."""
        assert self.num_batches_tracked is not None  # as the running statistics are not
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, var)):
            if running is not None:
                running.copy_(running + momentum * (now - running))


class FieldNorm(nn.Module):
    """A 2-D normalisation applied to fields: [B, m * |G|, H, W] -> the same, statistics per field.

    The group axis counts as space, [B, m, |G| * H, W], so that a rotation, which permutes a field's channels, only
    permutes positions. With `nn.BatchNorm2d` this is escnn's `InnerBatchNorm`. The wrapped layer is a module of its own
    (`per_field`): tools that look for batch norms (sync, freeze, statistics) find it, and hooks on it are called. The
    output has the memory format of the input.

    Args:
        fields: m, the number of fields.
        order: |G|.
        norm_layer: makes the wrapped layer from a number of channels; must not depend on the positions. An
            `nn.BatchNorm2d` becomes a `FieldBatchNorm2d`.
        device: where to create the parameters.
        dtype: their type.
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
        norm = norm_layer(fields, device=device, dtype=dtype)
        if type(norm) is nn.BatchNorm2d:
            options = {"eps": norm.eps, "momentum": norm.momentum, "affine": norm.affine}
            options["track_running_stats"] = norm.track_running_stats
            norm = FieldBatchNorm2d(fields, order, **options, device=device, dtype=dtype)
        self.per_field: nn.Module = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if is_channels_last(x):
                return self._forward_channels_last(x)
            if leaves_python() and self._is_fixed():
                return self.per_field.normalize_channels(x)
        B, C, H, W = x.shape
        fields = x.reshape(B, self.fields, self.order * H, W)  # [B, m * |G|, H, W] -> [B, m, |G| * H, W]
        return self.per_field(fields).reshape(B, C, H, W)

    @torch.jit.unused
    def _is_fixed(self) -> bool:
        """Whether it is a batch norm with given statistics: a graph of it needs no reshape, and so has open sizes."""
        norm = self.per_field
        return isinstance(norm, FieldBatchNorm2d) and not norm.training and norm.running_mean is not None

    @torch.jit.unused
    def _forward_channels_last(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        if isinstance(self.per_field, nn.modules.batchnorm._BatchNorm):  # all positions of all images alike: no copy
            pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, self.fields, self.order, 1)  # [B, H, W, m * |G|]
            return self.per_field(pixels).reshape(B, H, W, C).permute(0, 3, 1, 2)
        fields = x.reshape(B, self.fields, self.order * H, W)
        return self.per_field(fields).reshape(B, C, H, W).contiguous(memory_format=torch.channels_last)


register_notrace_module(FieldNorm)  # one node where timm traces a model for its features: it depends on the format of x
