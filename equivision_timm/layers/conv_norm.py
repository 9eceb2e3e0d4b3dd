"""Steerable convolution followed by field normalisation: the unit that folds into one plain convolution."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from equivision_timm.layers.conv import SteerableConv2d
from equivision_timm.layers.norm import FieldNorm

__all__ = ["ConvNorm"]


class ConvNorm(nn.Module):
    """`SteerableConv2d`, then `FieldNorm`: [B, in_fields * H, ...] -> [B, out_fields * |G|, ...]; see there."""

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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = SteerableConv2d(in_fields, out_fields, kernel_size, group, input_type, stride, dilation, **dd)
        self.norm = FieldNorm(out_fields, self.conv.order, norm_layer, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        """One `nn.Conv2d` with bias that computes the same in eval mode; called by timm's `reparameterize_model`.

        K' = K gamma / sqrt(var + eps),  bias = beta - mean gamma / sqrt(var + eps), each field's value repeated over
        its |G| channels. A normalisation without running statistics cannot be folded and stays behind the convolution.
        """
        conv, norm = self.conv.fuse(), self.norm.per_field
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            return nn.Sequential(conv, self.norm)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, var, weight, bias = (s if s is None else s.repeat_interleave(self.norm.order) for s in statistics)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, None, mean, var, norm.eps, weight, bias)
        return conv
