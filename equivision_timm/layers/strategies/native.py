"""The block-diagonal convolution in C, for the CPU: all its steps on a few pixels at a time, in the caches.

native.c is the algorithm of `block_diagonal.py`; the outputs agree up to float noise. Two operators for PyTorch:

    native_conv2d(x, w)                                = K(w) * x                      gradients for x and w
    native_fused_conv2d(x, packed, bias, shortcut)     = act(K * x + bias + shortcut)  gradients for x and the shortcut

w are the coefficients, `packed` constant block weights in the order of native.c. Each operator is one node for autograd
and `torch.compile`; no dense filter exists anywhere.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import register_flop_formula

from equivision_timm.layers.strategies import native_call, native_library
from equivision_timm.layers.strategies.basis import basis_for, block_weights, named_kernel
from equivision_timm.layers.strategies.contract import STRATEGIES, Layer, Strategy, register

__all__ = ["Native", "NativeConv2d"]


@register
class Native(Strategy):
    name = "native"
    plain_operations = False

    def supports(self, layer: Layer) -> str | None:
        if layer.kernel.input_type != "regular":
            return f"it needs regular fields, but the input of this layer is {layer.kernel.input_type}"
        if (size := layer.kernel.size) not in native_call.SIZES:
            return f"native.c has kernels of 1 x 1, 3 x 3 and 5 x 5, not {size} x {size}"
        if layer.device.type not in ("cpu", "meta"):
            return f"it runs on the CPU, but this layer is on {layer.device}"
        return native_library.why_not()

    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        return conv2d(x, weight.to(layer.dtype), layer.kernel.name, layer.stride, layer.dilation)


class NativeConv2d(nn.Module):
    """act(K * x + bias + shortcut) with constant weights, in one call of native.c; act is ReLU or nothing.

    Input [B, in_fields * |G|, H, W], output and shortcut [B, out_fields * |G|, H', W'], field-major. Differentiable
    with respect to x and the shortcut. `weight` are the coefficients [O, I, n_basis, 1], `bias` [O] is added to each
    field. They are packed for one kind of processor, and the shape of `packed` says which.
    """

    @torch.no_grad()
    def __init__(self, layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool = False) -> None:
        super().__init__()
        self.layer: tuple[str, int, int, int] = layer.kernel.name, layer.out_fields, layer.stride, layer.dilation
        self.relu = relu
        packed = native_call.pack(weight.detach(), layer.kernel.name)
        self.packed: torch.Tensor
        self.register_buffer("packed", packed)  # [n, rows of a tile]
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().to(packed))

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        return fused_conv2d(x, self.packed, self.bias, shortcut, self.relu, *self.layer)

    def extra_repr(self) -> str:
        return "kernel={!r}, out_fields={}, stride={}, dilation={}".format(*self.layer) + f", relu={self.relu}"


# The operators. Convolutions of x [B, I * |G|, H, W], field-major, by coefficients w [O, I, n_basis, 1], with the
# padding dilation * (k // 2): [B, O * |G|, H', W']. Not differentiable in forward mode nor by `torch.func` transforms.


def _operator(name: str, function: Callable[..., Any]) -> Any:
    return torch.library.custom_op(f"equivision_timm::{name}", function, mutates_args=())


conv2d: Any = _operator("native_conv2d", native_call.convolve)
fused_conv2d: Any = _operator("native_fused_conv2d", native_call.forward)
gradients: Any = _operator("native_conv2d_backward", native_call.backward)  # for x and the block weights W


def _empty_output(x, out_fields, kernel, stride):
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return x.new_empty(x.shape[0], out_fields * named_kernel(kernel).order, height, width)


@conv2d.register_fake
def _(x, weight, kernel, stride, dilation):
    return _empty_output(x, weight.shape[0], kernel, stride)


@fused_conv2d.register_fake
def _(x, packed, bias, shortcut, relu, kernel, out_fields, stride, dilation):
    return _empty_output(x, out_fields, kernel, stride)


@gradients.register_fake
def _(grad, x, weights, kernel, stride, dilation, for_x, for_weights):
    return x.new_empty(x.shape if for_x else 0), weights.new_empty(weights.shape if for_weights else 0)


def _save(ctx, inputs, output):
    x, weight, *ctx.layer = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    kernel, stride, dilation = ctx.layer
    if torch.is_grad_enabled():  # the gradient is to be differentiated: by operations that PyTorch differentiates
        layer = Layer(named_kernel(kernel), weight.shape[1], weight.shape[0], stride, dilation, x.dtype)
        y = STRATEGIES["block_diagonal"].conv2d(x, weight, layer)
        found = iter(torch.autograd.grad(y, [t for t in (x, weight) if t.requires_grad], grad, create_graph=True))
        dx, dw = (next(found) if t.requires_grad else None for t in (x, weight))
        return dx, dw, None, None, None
    for_x, for_weight = ctx.needs_input_grad[:2]
    dx, dw = gradients(grad, x, block_weights(weight, kernel), kernel, stride, dilation, for_x, for_weight)
    if for_weight:
        dw = dw.reshape(len(dw), -1).T @ basis_for(dw, kernel, "blocks").T  # [O * I, entries] @ [entries, n_basis]
        dw = dw.reshape(weight.shape)
    return dx if for_x else None, dw if for_weight else None, None, None, None


def _save_fused(ctx, inputs, output):
    x, packed, _, _, ctx.relu, ctx.kernel, ctx.out_fields, *ctx.steps = inputs
    ctx.save_for_backward(x, packed, output)


def _differentiate_fused(ctx, grad):
    """d_shortcut = grad where y > 0,  dx = K^T * d_shortcut; bias and weights are constants."""
    x, packed, y = ctx.saved_tensors
    grad = torch.where(y > 0, grad, 0.0) if ctx.relu else grad
    dx = None
    if ctx.needs_input_grad[0]:
        weights = native_call.unpack(packed, ctx.kernel, ctx.out_fields)
        dx = gradients(grad, x, weights, ctx.kernel, *ctx.steps, True, False)[0]
    return dx, None, None, grad if ctx.needs_input_grad[3] else None, *[None] * 5


conv2d.register_autograd(_differentiate, setup_context=_save)
fused_conv2d.register_autograd(_differentiate_fused, setup_context=_save_fused)


# FlopCounterMode counts the dense convolution that an operator stands for, so that all strategies count the same


def _dense(x, y, kernel):
    return 2 * math.prod(y) * x[1] * named_kernel(kernel).size ** 2


@register_flop_formula([torch.ops.equivision_timm.native_conv2d, torch.ops.equivision_timm.native_fused_conv2d])
def _(x, *arguments, out_shape, **kwargs):
    return _dense(x, out_shape, next(value for value in arguments if isinstance(value, str)))


@register_flop_formula(torch.ops.equivision_timm.native_conv2d_backward)
def _(grad, x, weights, kernel, stride, dilation, for_x, for_weights, **kwargs):
    return (for_x + for_weights) * _dense(x, grad, kernel)
