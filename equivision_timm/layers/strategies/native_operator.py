"""A convolution by block weights in a language that PyTorch does not know, as an operator for it.

The operator is one node for autograd and `torch.compile`; its gradients flow to the block weights, and from there to
the coefficients: no dense filter exists anywhere.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import register_flop_formula

from equivision_timm.groups import group_order
from equivision_timm.layers.strategies.basis import named_kernel

__all__ = ["operator"]


def operator(
    name: str, forward: Callable[..., torch.Tensor], backward: Callable[..., list[torch.Tensor]]
) -> Callable[..., torch.Tensor]:
    """The operator conv2d(x, weights, kernel, stride, dilation) of a strategy.

    Steerable convolution of x [B, I * |G|, height, width], regular fields, field-major, by `block_weights`, with the
    padding dilation * (k // 2): [B, O * |G|, height', width']. Differentiable any number of times with respect to x and
    the weights; not in forward mode, nor by the transforms of `torch.func`.

    Args:
        name: of the operator, in the namespace equivision_timm.
        forward: computes it.
        backward: from (grad, x, weights, kernel, stride, dilation, for_x, for_weights) the gradients with
            respect to x, if `for_x`, and to the weights, if `for_weights`, in one list.
    """
    layer = "str kernel, int stride, int dilation"
    schema = f"(Tensor x, Tensor weights, {layer}) -> Tensor"
    conv2d = torch.library.custom_op(f"equivision_timm::{name}", forward, mutates_args=(), schema=schema)

    def both(grad, x, weights, kernel, stride, dilation, for_x, for_weights):
        """The gradient with respect to x, and to the weights; one that is not needed is empty."""
        found = iter(backward(grad, x, weights, kernel, stride, dilation, for_x, for_weights))
        return next(found) if for_x else x.new_empty(0), next(found) if for_weights else x.new_empty(0)

    # Two tensors and no list, since old-style `vmap` (is_grads_batched) takes no lists
    schema = f"(Tensor grad, Tensor x, Tensor weights, {layer}, bool for_x, bool for_weights) -> (Tensor, Tensor)"
    gradients = torch.library.custom_op(f"equivision_timm::{name}_backward", both, mutates_args=(), schema=schema)

    @conv2d.register_fake
    def _(x, weights, kernel, stride, dilation):
        height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
        return x.new_empty(x.shape[0], weights.shape[1] * group_order(named_kernel(kernel).group), height, width)

    @gradients.register_fake
    def _(grad, x, weights, kernel, stride, dilation, for_x, for_weights):
        return x.new_empty(x.shape if for_x else 0), weights.new_empty(weights.shape if for_weights else 0)

    def setup_context(ctx, inputs, output) -> None:
        x, weights, *ctx.layer = inputs
        ctx.save_for_backward(x, weights)

    def differentiate(ctx, grad):
        x, weights = ctx.saved_tensors
        for_x, for_weights = ctx.needs_input_grad[:2]
        dx, dw = gradients(grad, x, weights, *ctx.layer, for_x, for_weights)
        return dx if for_x else None, dw if for_weights else None, None, None, None

    def setup_second(ctx, inputs, output) -> None:
        grad, x, weights, *ctx.layer, ctx.for_x, ctx.for_weights = inputs
        ctx.save_for_backward(grad, x, weights)

    def differentiate_again(ctx, u, v):
        """With C(x, W) the convolution, A(g, W) and B(g, x) its gradients with respect to x and W for a gradient g,

        <u, A(g, W)> = <g, C(u, W)> and <v, B(g, x)> = <g, C(x, v)>: the derivative of what `gradients` returns, for
        the gradients u of A and v of B, is C(u, W) + C(x, v) for g, A(g, v) for x, B(g, u) for W.
        """
        grad, x, weights = ctx.saved_tensors
        for_grad, second_x, second_weights = ctx.needs_input_grad[:3]
        u, v = u if ctx.for_x else None, v if ctx.for_weights else None
        of_grad = of_x = of_weights = None
        if for_grad:
            parts = [(u, weights)] if u is not None else []
            parts += [(x, v)] if v is not None else []
            of_grad = sum(conv2d(a, b, *ctx.layer) for a, b in parts) if parts else None
        if second_x and v is not None:
            of_x, _ = gradients(grad, x, v, *ctx.layer, True, False)
        if second_weights and u is not None:
            _, of_weights = gradients(grad, u, weights, *ctx.layer, False, True)
        return of_grad, of_x, of_weights, *[None] * 5

    conv2d.register_vmap(partial(_one_by_one, conv2d))  # of gradients whose forward pass was not transformed
    gradients.register_vmap(partial(_one_by_one, gradients))
    conv2d.register_autograd(differentiate, setup_context=setup_context)
    gradients.register_autograd(differentiate_again, setup_context=setup_second)
    _count_operations(name)
    return conv2d


def _one_by_one(operator: Callable, info, in_dims: tuple[int | None, ...], *arguments) -> tuple:
    """The rule of `torch.vmap`: the operator for each of the batch, and the dimension of the batch in the outputs."""
    outputs = []
    for index in range(info.batch_size):
        own = [a if d is None else a.select(d, index) for a, d in zip(arguments, in_dims, strict=True)]
        outputs.append(operator(*own))
    if isinstance(outputs[0], torch.Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _count_operations(name: str) -> None:
    """Tell `torch.utils.flop_counter.FlopCounterMode` what to count.

    That is the dense convolution which the operator stands for, so that a layer counts the same by every strategy.
    """
    registered = getattr(torch.ops.equivision_timm, name), getattr(torch.ops.equivision_timm, f"{name}_backward")

    def dense(pixels: int, weights: torch.Size, kernel: str) -> int:
        kernels = named_kernel(kernel)
        return 2 * pixels * math.prod(weights[1:]) * (group_order(kernels.group) * kernels.size) ** 2

    @register_flop_formula(registered[0])
    def _(x, weights, kernel, stride, dilation, *, out_shape, **kwargs) -> int:
        return dense(out_shape[0] * out_shape[2] * out_shape[3], weights, kernel)

    @register_flop_formula(registered[1])
    def _(grad, x, weights, kernel, stride, dilation, for_x, for_weights, *, out_shape, **kwargs) -> int:
        return (for_x + for_weights) * dense(grad[0] * grad[2] * grad[3], weights, kernel)
