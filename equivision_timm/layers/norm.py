"""Normalisation and channel attention of fields: statistics, parameters and scales shared over the group.

A field is |G| channels. The mean and variance of a batch norm, over batch, group and space, follow from those of the
channels,

    mean_f = mean_g(mean_g)      var_f = mean_g(var_g) + mean_g((mean_g - mean_f)^2)

as if each element of the group were a rank of a synchronised batch norm. So maps in the channels-last format are read
where they are, whereas a reshape to [B, fields, |G| * H, W] would copy them; and a GPU works on |G| times more channels
at once.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_attn, register_notrace_module

from equivision_timm.layers.checks import check_positionwise
from equivision_timm.torch_state import (
    BatchNorm,
    is_channels_last,
    leaves_python,
    needs_plain_operations,
    unrecorded_view,
)

__all__ = ["FieldAttention", "FieldBatchNorm2d", "FieldNorm", "field_batch_norm", "field_batch_norm_by_definition"]

FieldValues: TypeAlias = torch.Tensor | None  # [fields]


class FieldBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on fields, faster in two formats: [B, m, |G| * H, W] -> the same.

    Channels-last maps, and every map on another device than the CPU, are normalised by channel; contiguous maps on the
    CPU, graphs and transforms take PyTorch's own batch norm. Parameters, buffers and results are the same.
    """

    def __init__(self, fields: int, order: int, **kwargs: Any) -> None:
        super().__init__(fields, **kwargs)
        self.order = order

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        momentum, count = 0.0 if self.momentum is None else self.momentum, self.num_batches_tracked
        if self.training and count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if self.momentum is None else momentum  # the mean of all batches so far
        if not torch.jit.is_scripting() and self._by_channel(input):
            return self._forward_by_channel(input, momentum)
        stats = self.running_mean, self.running_var  # PyTorch's forward, since TorchScript does not support super()
        batch = self.training or self.running_mean is None
        return F.batch_norm(input, stats[0], stats[1], self.weight, self.bias, batch, momentum, self.eps)

    @torch.jit.unused
    def _by_channel(self, x: torch.Tensor) -> bool:
        """Whether x is on another device than the CPU, or channels-last, [pixels, m, |G|, 1]."""
        if not isinstance(x, torch.Tensor):  # a proxy of torch.fx
            return False
        pixels = x.shape[2:] == (self.order, 1) and not torch.compiler.is_compiling()
        if x.device.type == "cpu" and not pixels:
            return False
        return self.order > 1 and not leaves_python() and not needs_plain_operations(x)

    @torch.jit.unused
    def _forward_by_channel(self, x: torch.Tensor, momentum: float) -> torch.Tensor:
        channels = x.reshape(x.shape[0], self.num_features * self.order, -1)  # of [B, m, |G| * L, 1]: [B, m * |G|, L]
        if self.has_given_statistics():
            return self.normalize_channels(channels).view(x.shape)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        fields, values = self.num_features, x.numel() // self.num_features
        weight = x.new_ones(fields, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        bias = x.new_zeros(fields, dtype=dtype) if self.bias is None else self.bias.to(dtype)
        by_channel = field_batch_norm_by_definition if torch.compiler.is_compiling() else field_batch_norm
        y, mean, var = by_channel(channels, self.order, weight, bias, self.eps)
        with torch.no_grad():  # running <- (1 - momentum) running + momentum now, the unbiased variance
            for running, now in ((self.running_mean, mean), (self.running_var, var * (values / (values - 1)))):
                if running is not None:
                    running.copy_(running + momentum * (now - running))
        return y.view(x.shape)

    @torch.jit.unused
    def has_given_statistics(self) -> bool:
        """Whether the running statistics are used."""
        return not self.training and self.running_mean is not None

    @torch.jit.unused
    def normalize_channels(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, m * |G|, ...] normalized by the running statistics."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if t is None else t.to(dtype) for t in given)
        return normalize(x, self.order, mean, var, weight, bias, self.eps)


class FieldNorm(nn.Module):
    """A 2-D normalisation applied to fields: [B, m * |G|, H, W] -> the same, statistics per field.

    The group axis counts as space, [B, m, |G| * H, W], so that a rotation, which permutes a field's channels, only
    permutes positions. With `nn.BatchNorm2d` this is escnn's `InnerBatchNorm`. The wrapped layer is a module of its own
    (`per_field`): tools that look for batch norms (sync, freeze, statistics) find it, and hooks on it are called. The
    output has the memory format of the input.

    Args:
        fields: m.
        order: |G|.
        norm_layer: makes the wrapped layer from a number of channels; must not depend on the positions. An
            `nn.BatchNorm2d` becomes a `FieldBatchNorm2d`.
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
            return self._forward_in_format(x)
        B, C, H, W = x.shape
        fields = x.reshape(B, self.fields, self.order * H, W)  # [B, m * |G|, H, W] -> [B, m, |G| * H, W]
        return self.per_field(fields).reshape(B, C, H, W)

    @torch.jit.unused
    def _forward_in_format(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.per_field
        fast = isinstance(norm, FieldBatchNorm2d)
        if fast and leaves_python() and norm.has_given_statistics():
            return norm.normalize_channels(x)  # without a reshape: the graph is open for images of every size
        B, C, H, W = x.shape
        last = is_channels_last(x)
        if last and isinstance(norm, BatchNorm):  # all positions of all images alike: no copy
            pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, self.fields, self.order, 1)  # [B, H, W, m * |G|]
            y = norm(pixels).reshape(B, H, W, C).permute(0, 3, 1, 2)
            return unrecorded_view(y) if fast and B > 1 else y  # for B = 1 it would change the stride of the batch
        y = norm(x.reshape(B, self.fields, self.order * H, W)).reshape(B, C, H, W)
        y = unrecorded_view(y) if fast else y
        return y.contiguous(memory_format=torch.channels_last) if last else y


class FieldAttention(FieldNorm):
    """An attention layer of timm, applied to fields as `FieldNorm` applies a norm: one scale for each field.

    A rotation only permutes positions of [B, m, |G| * H, W], which a layer that squeezes over all of them ignores.

    Args:
        attn_layer: a name timm knows, such as 'se', 'ese' or 'eca', or a class; must treat all positions alike.
        kwargs: `device` and `dtype`.

    Raises:
        ValueError: an unknown name, or a layer that depends on the position (CBAM, coordinate attention, ...).
    """

    def __init__(
        self, fields: int, order: int, attn_layer: str | Callable[..., nn.Module] = "se", **kwargs: Any
    ) -> None:
        try:
            make = get_attn(attn_layer)
            assert make is not None
            check_positionwise(make, fields)
        except (ValueError, TypeError, AssertionError) as error:  # the latter two from timm
            raise ValueError(
                f"attn_layer {attn_layer!r} is unknown or does not treat all positions alike: use 'se', 'ese' or 'eca'"
            ) from error
        super().__init__(fields, order, make, **kwargs)


register_notrace_module(FieldNorm)  # one node where timm traces a model for its features: it depends on the format of x


# The batch norm by channel
def field_batch_norm(
    x: torch.Tensor, order: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`field_batch_norm_by_definition` by PyTorch's own kernels of batch norm, in fewer passes.

    Differentiable any number of times with respect to x, `weight` and `bias`, only through y.
    """
    return _FieldBatchNorm.apply(x, order, weight, bias, eps)


def field_batch_norm_by_definition(
    x: torch.Tensor, order: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean_f) weight_f / sqrt(var_f + eps) + bias_f, of the type of x; mean_f and biased var_f, [fields].

    x is [N, fields * |G|, L], contiguous; weight and bias [fields], of the type in which to compute: float64 for
    float64, else float32.
    """
    values = x.to(weight.dtype)
    var, mean = torch.var_mean(values, (0, 2), correction=0)
    mean_f, var_f = _join(mean, var, order)
    scale = weight * torch.rsqrt(var_f + eps)
    shift = bias - mean_f * scale
    scale, shift = (t.repeat_interleave(order).view(-1, 1) for t in (scale, shift))  # [fields * |G|, 1]
    return (values * scale + shift).to(x.dtype), mean_f, var_f


def normalize(
    x: torch.Tensor, order: int, mean: FieldValues, var: FieldValues, weight: FieldValues, bias: FieldValues, eps: float
) -> torch.Tensor:
    """(x - mean) weight / sqrt(var + eps) + bias, with given statistics; no weight or bias if None."""
    each = (None if t is None else t.repeat_interleave(order) for t in (mean, var, weight, bias))
    return F.batch_norm(x, *each, training=False, eps=eps)


def _join(mean: torch.Tensor, var: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [fields] of fields from those of their channels [fields * |G|]."""
    mean, var = mean.view(-1, order), var.view(-1, order)  # [fields, |G|]
    mean_f = mean.mean(1)
    return mean_f, var.mean(1) + (mean - mean_f[:, None]).square().mean(1)


def _statistics(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, in `dtype`: what a batch norm of the channels saves for its gradient.

    PyTorch's other functions that return them are many times slower in the channels-last format, or round them.
    """
    one, zero = x.new_ones(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    _, mean, inverse = torch.native_batch_norm(x, one, zero, None, None, True, 0.0, 0.0)
    return mean, torch.where(inverse > 0, inverse.square().reciprocal(), 0.0)  # 1 / sqrt(var), or 0 for var = 0


def _sums(dy: torch.Tensor, x: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum dy and sum dy (x - centre) of each channel, in the type of `centre`, without anything as large as a map.

    They are the gradients of a batch norm with the mean `centre` and the variance 1 for its bias and weight.
    """
    one = torch.ones_like(centre)
    gradients = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, centre, one, None, None, False, 0.0, [False, True, True]
    )
    return gradients[2], gradients[1]


class _FieldBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, weight, bias, eps):
        mean_f, var_f = _join(*_statistics(x, weight.dtype), order)
        ctx.save_for_backward(x, weight, bias, mean_f, var_f)
        ctx.order, ctx.eps = order, eps
        ctx.mark_non_differentiable(mean_f, var_f)
        return normalize(x, order, mean_f, var_f, weight, bias, eps), mean_f, var_f

    @staticmethod
    def backward(ctx, *grads):
        """With s1 = sum dy and s2 = sum dy (x - mean) over batch, group and space, n positions of each field, and
        inv = 1 / sqrt(var + eps):

        dx = weight inv (dy - s1 / n - (x - mean) inv^2 s2 / n)      dweight = s2 inv      dbias = s1
        """
        dy, _, _ = grads
        x, weight, bias, mean, var = ctx.saved_tensors
        order = ctx.order
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            y = field_batch_norm_by_definition(x, order, weight, bias, ctx.eps)[0]
            inputs = [t for t in (x, weight, bias) if t.requires_grad]
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
            dx, dweight, dbias = (next(found) if t.requires_grad else None for t in (x, weight, bias))
            return dx, None, dweight, dbias, None
        dy = dy.contiguous()
        s1, s2 = (t.view(-1, order).sum(1) for t in _sums(dy, x, mean.repeat_interleave(order)))
        inv = torch.rsqrt(var + ctx.eps)
        dx = None
        if ctx.needs_input_grad[0]:
            n = x.numel() // x.shape[1] * order
            scale = weight * inv
            slope = -scale * inv.square() * s2 / n
            shift = -scale * s1 / n
            zero, one = torch.zeros_like(mean), torch.ones_like(mean)
            dx = normalize(dy, order, zero, one, scale, shift, 0.0)  # scale dy + shift
            dx += normalize(x, order, mean, one, slope, zero, 0.0)  # slope (x - mean)
        return dx, None, s2 * inv, s1, None
