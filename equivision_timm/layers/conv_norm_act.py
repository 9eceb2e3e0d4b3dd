"""The unit that networks are written in: act(norm(conv(x)) + shortcut). What may run as one is decided here alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropBlock2d, DropPath, register_notrace_module

from equivision_timm.layers.block_conv import element_major_conv
from equivision_timm.layers.conv import SteerableConv2d
from equivision_timm.layers.norm import FieldNorm
from equivision_timm.layers.stock import is_stock, no_global_hooks, remember
from equivision_timm.layers.strategies.context import inference_only

__all__ = ["ConvNormAct"]


class ConvNormAct(nn.Module):
    """Convolution, norm, attention, drop, shortcut, activation: act(drop(attn(norm(conv(x)))) + shortcut).

    Input [B, in_fields * H, height, width], output [B, out_fields * |G|, height', width'], as `SteerableConv2d`; the
    shortcut has the shape of the output. In inference a batch norm is fused into the coefficients, and shortcut and
    ReLU go with the convolution, wherever nobody would see that the layers inside are not called.

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        kernel_size: pixels along a side of the kernel.
        group: name of the group.
        input_type: 'regular', or 'trivial' for an image.
        stride: of the convolution.
        dilation: of the convolution.
        norm_layer: normalisation wrapped by `FieldNorm`.
        act_layer: pointwise activation; None for none.
        attn: attention of the output fields, in front of the shortcut, such as `FieldAttention`; None for none.
        drop: what drops parts of the branch in training, such as timm's `DropPath`; None for nothing.
        cutoff: of the kernels, see `SteerableConv2d`.
        low_pass: whether the kernels are smooth, see `SteerableConv2d`.
        device: where to create the parameters.
        dtype: their type.
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        kernel_size: int,
        group: str,
        input_type: str = "regular",
        stride: int = 1,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        attn: nn.Module | None = None,
        drop: nn.Module | None = None,
        cutoff: int | None = None,
        low_pass: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kernel: dict[str, Any] = {"input_type": input_type, "cutoff": cutoff, "low_pass": low_pass}
        self.conv: SteerableConv2d = SteerableConv2d(
            in_fields, out_fields, kernel_size, group, stride=stride, dilation=dilation, **kernel, **dd
        )
        self.norm: FieldNorm = FieldNorm(out_fields, self.conv.order, norm_layer, **dd)
        self.attn: nn.Module = nn.Identity() if attn is None else attn
        self.drop: nn.Module = nn.Identity() if drop is None else drop
        self.act: nn.Module = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.jit.is_scripting() and self._norm_fuses(x):
            return self._fused(x, shortcut)
        return self._end(self.norm(self.conv(x)), shortcut)

    def _end(self, y: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
        y = self.drop(self.attn(y))
        return self.act(y if shortcut is None else y + shortcut)

    @torch.jit.unused
    def _norm_fuses(self, x: torch.Tensor) -> bool:
        """Whether convolution and norm may run as one: inference, both as they were made, and the norm linear."""
        return (
            inference_only(x)
            and no_global_hooks()
            and is_stock(self.conv, SteerableConv2d)
            and self._is_batch_norm()
            and not self.norm.per_field.training
        )

    @torch.jit.unused
    def _fused(self, x: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
        """`forward` where the norm fuses; in one pass where what follows may, too."""
        if self._adds_nothing() and is_stock(self.act, nn.ReLU, nn.Identity):
            relu = isinstance(self.act, nn.ReLU)
            return self.conv.infer(x, *self._norm_to_fuse(), shortcut, relu)
        return self._end(self.conv.infer(x, *self._norm_to_fuse()), shortcut)

    def _adds_nothing(self) -> bool:
        """Whether attention and drop return their input."""
        drop = self.drop
        passes = is_stock(drop, nn.Identity) or (is_stock(drop, DropPath, DropBlock2d) and not drop.training)
        return passes and is_stock(self.attn, nn.Identity)

    def _is_batch_norm(self) -> bool:
        """Whether the norm is a batch norm with running statistics, as it was made."""
        return (
            is_stock(self.norm, FieldNorm)
            and is_stock(self.norm.per_field, nn.BatchNorm2d, nn.SyncBatchNorm)
            and self.norm.per_field.running_mean is not None
        )

    def _batch_norm(self) -> nn.modules.batchnorm._BatchNorm:
        norm = self.norm.per_field
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # `_is_batch_norm`
        return norm

    def _norm_to_fuse(self) -> tuple[Callable[..., Any], list[torch.Tensor], float]:
        """What makes the weights with the norm in them; the tensors and the number that it depends on."""
        norm = self._batch_norm()
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return self._with_norm, [t for t in statistics if t is not None], norm.eps

    def _with_norm(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w' = w gamma / sqrt(var + eps),  bias = beta - mean gamma / sqrt(var + eps), field by field."""
        norm = self._batch_norm()
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        gamma = torch.ones_like(var) if norm.weight is None else norm.weight
        beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
        scale = gamma * torch.rsqrt(var + norm.eps)
        return weight * scale[:, None, None, None], beta - mean * scale

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """Becomes plain for deployment, and returns itself; called by timm's `reparameterize_model` on its copy.

        The convolution becomes one `nn.Conv2d`, and a batch norm with running statistics part of it: the same output in
        eval mode. Any other norm stays. A unit that has hooks, or whose convolution was replaced, stays as it is.
        """
        if self.fuses():
            self._replace(self.conv.plain_conv(*self._with_norm(self.conv.weight)))
        elif is_stock(self, ConvNormAct) and is_stock(self.conv, SteerableConv2d):
            self.add_module("conv", self.conv.plain_conv(self.conv.weight, None).train(self.training))
        return self

    @torch.jit.unused
    def fuses(self) -> bool:
        """Whether `fuse` makes one convolution of convolution and norm."""
        return is_stock(self, ConvNormAct) and is_stock(self.conv, SteerableConv2d) and self._is_batch_norm()

    @torch.jit.unused
    def fuse_element_major(self) -> None:
        """Becomes plain where it `fuses`, for element-major maps, in blocks where they cost less (`block_conv.py`)."""
        self._replace(element_major_conv(self.conv, *self._with_norm(self.conv.weight)))

    @torch.jit.unused
    def _replace(self, conv: nn.Module) -> None:
        """Take `conv` for convolution and norm."""
        self.add_module("conv", conv.train(self.training))
        self.add_module("norm", nn.Identity())


remember(ConvNormAct)
register_notrace_module(ConvNormAct)  # as SteerableConv2d
