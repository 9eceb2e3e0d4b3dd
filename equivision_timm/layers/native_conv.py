"""Steerable convolution for deployment on the CPU: constant weights, packed once for the C code."""

import torch
import torch.nn as nn

from equivision_timm.layers.conv import SteerableConv2d
from equivision_timm.layers.strategies import native, native_call

__all__ = ["NativeConv2d"]


class NativeConv2d(nn.Module):
    """act(K * x + bias + shortcut) with constant weights, in one call of native.c; act is ReLU or nothing.

    Input [B, in_fields * |G|, H, W], output and shortcut [B, out_fields * |G|, H', W'], field-major. Differentiable
    with respect to x and the shortcut. `packed` is for one kind of processor, and its shape says which. `weight` are
    the coefficients [O, I, n_basis, 1] in place of those of `conv`; `bias` [O] is added to each field.
    """

    @torch.no_grad()
    def __init__(
        self, conv: SteerableConv2d, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool = False
    ) -> None:
        super().__init__()
        self.kernel: str = conv.kernel.name
        self.in_fields: int = conv.in_fields
        self.out_fields: int = conv.out_fields
        self.stride: int = conv.stride
        self.dilation: int = conv.dilation
        self.relu = relu
        packed = native_call.pack(weight.detach(), self.kernel)
        self.packed: torch.Tensor
        self.register_buffer("packed", packed)  # [n, rows of a tile]
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().to(packed))

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        packed = self.packed
        if packed.device.type != "cpu" or packed.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"a model fused in the form 'native' computes on the CPU in float32 or float64, but was moved to "
                f"{packed.device} or cast to {packed.dtype}: move or cast the model first, then call `fuse`"
            )
        layer = self.kernel, self.out_fields, self.stride, self.dilation
        return native.fused_conv2d(x, packed, self.bias, shortcut, self.relu, *layer)

    def extra_repr(self) -> str:
        return (
            f"{self.in_fields}, {self.out_fields}, kernel={self.kernel!r}, stride={self.stride}, "
            f"dilation={self.dilation}, relu={self.relu}"
        )
