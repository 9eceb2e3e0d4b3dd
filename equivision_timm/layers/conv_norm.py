"""Steerable convolution followed by field normalisation: the unit that folds into one plain convolution."""

from collections.abc import Callable

import torch
import torch.nn as nn
from timm.layers import register_notrace_module

from equivision_timm.layers.conv import SteerableConv2d
from equivision_timm.layers.conv_strategies.expand import leaves_python
from equivision_timm.layers.norm import FieldNorm

__all__ = ["ConvNorm"]


@register_notrace_module  # as SteerableConv2d
class ConvNorm(nn.Module):
    """`SteerableConv2d`, then `FieldNorm`: [B, in_fields * H, ...] -> [B, out_fields * |G|, ...]; see there.

    In eval mode and without gradients a batch norm is folded into the coefficients, and the two layers inside are not
    called, unless they have hooks.
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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = SteerableConv2d(in_fields, out_fields, kernel_size, group, input_type, stride, dilation, **dd)
        self.norm = FieldNorm(out_fields, self.conv.order, norm_layer, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.norm(self.conv(x))
        else:
            return self.infer(x) if self.folds() else self.norm(self.conv(x))

    @torch.jit.unused
    def infer(self, x: torch.Tensor, shortcut: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
        """The same where `folds`, with the normalisation folded into the coefficients.

        Args:
            x: as for `forward`.
            shortcut: is added to the output, or None.
            relu: whether to end with ReLU.
        """
        return self.conv.convolve(x, self._fold, self._statistics(), shortcut, relu)

    @torch.jit.unused
    def folds(self) -> bool:
        """Whether to fold: batch norm with running statistics, no gradients, no hooks that would see less."""
        norm, modules = self.norm.per_field, (self.conv, self.norm, self.norm.per_field)
        return (
            not norm.training
            and isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.running_mean is not None
            and not torch.is_grad_enabled()
            and not leaves_python()
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )

    def _statistics(self) -> list[torch.Tensor]:
        norm = self.norm.per_field
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias, torch.tensor(norm.eps, device="cpu"))
        return [t for t in statistics if t is not None]

    def _fold(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w' = w gamma / sqrt(var + eps),  bias = beta - mean gamma / sqrt(var + eps), field by field."""
        norm = self.norm.per_field
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        scale = gamma * torch.rsqrt(norm.running_var + norm.eps)
        return weight * scale[:, None, None, None], beta - norm.running_mean * scale

    def fuse(self) -> nn.Module:
        """One `nn.Conv2d` with bias that computes the same in eval mode; called by timm's `reparameterize_model`.

        A normalisation without running statistics cannot be folded and stays behind the convolution.
        """
        norm = self.norm.per_field
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            return nn.Sequential(self.conv.fuse(), self.norm)
        weight, bias = self._fold(self.conv.weight)
        return self.conv.fuse(weight, bias)
