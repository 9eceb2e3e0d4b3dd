"""What the strategies in the irreps basis share: the block weights, and the convolution by them as an operator.

The operator is one node for autograd and `torch.compile`; its gradients flow to the block weights, and from there to
the coefficients: no dense filter exists anywhere.
"""

from collections.abc import Callable

import torch

from equivision_timm.groups import Group

__all__ = ["block_weights", "operator"]


def block_weights(weight: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """W [entries, O, I], for each block [size (row), n, size (column), O, I] flattened; differentiable.

    Args:
        weight: w [O, I, n_basis, 1].
        coefficients: those of `IrrepsBasis`, [n_basis, entries], of the type and on the device of `weight`.
    """
    entries = coefficients.T @ weight.flatten(0, 1).squeeze(-1).T  # W = sum_b w_b coefficients_b: [entries, O * I]
    return entries.unflatten(1, weight.shape[:2])  # [entries, O, I]


def operator(name: str, forward: Callable, backward: Callable) -> Callable:
    """The operator conv2d(x, weights, bias, group, kernel_size, stride, dilation) of a strategy.

    Steerable convolution of x [B, I * |G|, height, width], regular fields, field-major, by `block_weights`, with the
    padding dilation * (kernel_size // 2): [B, O * |G|, height', width']. The bias [O], added to each field, may be
    None. Differentiable once with respect to x, the weights and the bias.

    Args:
        name: of the operator, in the namespace equivision_timm.
        forward: computes it.
        backward: from (grad, x, weights, group, kernel_size, stride, dilation, for_x, for_weights) the gradients with
            respect to x, if `for_x`, and to the weights, if `for_weights`, in one list.
    """
    layer = "str group, int kernel_size, int stride, int dilation"
    schema = f"(Tensor x, Tensor weights, Tensor? bias, {layer}) -> Tensor"
    conv2d = torch.library.custom_op(f"equivision_timm::{name}", forward, mutates_args=(), schema=schema)
    schema = f"(Tensor grad, Tensor x, Tensor weights, {layer}, bool for_x, bool for_weights) -> Tensor[]"
    gradients = torch.library.custom_op(f"equivision_timm::{name}_backward", backward, mutates_args=(), schema=schema)

    @conv2d.register_fake
    def _(x, weights, bias, group, kernel_size, stride, dilation):
        height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
        return x.new_empty(len(x), weights.shape[1] * Group.from_name(group).order, height, width)

    @gradients.register_fake
    def _(grad, x, weights, group, kernel_size, stride, dilation, for_x, for_weights):
        return [t.new_empty(t.shape) for t, needed in ((x, for_x), (weights, for_weights)) if needed]

    def setup_context(ctx, inputs, output) -> None:
        x, weights, _, *ctx.layer = inputs
        ctx.save_for_backward(x, weights)

    def differentiate(ctx, grad):
        x, weights = ctx.saved_tensors
        for_x, for_weights, for_bias = ctx.needs_input_grad[:3]
        found = iter(gradients(grad, x, weights, *ctx.layer, for_x, for_weights))
        dx, dw = next(found) if for_x else None, next(found) if for_weights else None
        dbias = grad.unflatten(1, (weights.shape[1], -1)).sum((0, 2, 3, 4)) if for_bias else None
        return dx, dw, dbias, None, None, None, None

    conv2d.register_autograd(differentiate, setup_context=setup_context)
    return conv2d
