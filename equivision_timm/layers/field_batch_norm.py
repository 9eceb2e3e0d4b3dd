"""Batch norm of regular fields, channel by channel: the statistics of a field are joined from those of its channels.

A field is |G| channels. Its mean and variance over batch, group and space follow from those of the channels,

    mean_f = mean_g(mean_g)      var_f = mean_g(var_g) + mean_g((mean_g - mean_f)^2)

as if each element of the group were a rank of a synchronised batch norm. So maps in the channels-last format are read
where they are, whereas a reshape to [B, fields, |G| * H, W] would copy them; and a GPU works on |G| times more channels
at once.
"""

import torch
import torch.nn.functional as F

__all__ = ["field_batch_norm", "field_batch_norm_by_definition", "normalize"]

_SPACE = (0, 2)  # all but the channel


def field_batch_norm(
    x: torch.Tensor, order: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`field_batch_norm_by_definition` by PyTorch's own kernels of batch norm, in fewer passes.

    Differentiable any number of times with respect to x, `weight` and `bias`, through y alone.
    """
    return _FieldBatchNorm.apply(x, order, weight, bias, eps)


def field_batch_norm_by_definition(
    x: torch.Tensor, order: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - mean_f) weight_f / sqrt(var_f + eps) + bias_f, of the type of x; mean_f and biased var_f, [fields].

    Args:
        x: [N, fields * |G|, L], field-major, contiguous.
        order: |G|.
        weight: [fields], of the type in which to compute: float64 for float64, else float32.
        bias: [fields], as `weight`.
        eps: added to the variance.
    """
    values = x.to(weight.dtype)
    var, mean = torch.var_mean(values, _SPACE, correction=0)
    mean_f, var_f = _join(mean, var, order)
    scale = weight * torch.rsqrt(var_f + eps)
    shift = bias - mean_f * scale
    scale, shift = (t.repeat_interleave(order).view(-1, 1) for t in (scale, shift))  # [fields * |G|, 1]
    return (values * scale + shift).to(x.dtype), mean_f, var_f


def normalize(
    x: torch.Tensor,
    order: int,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """(x - mean) weight / sqrt(var + eps) + bias, with given statistics, all [fields]; as in evaluation mode."""
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
            wanted = [t for t, needed in zip((x, weight, bias), _needed(ctx), strict=True) if needed]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            dx, dweight, dbias = (next(found) if needed else None for needed in _needed(ctx))
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


def _needed(ctx) -> tuple[bool, bool, bool]:
    """Whether x, weight and bias need gradients."""
    return ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
