"""Steerable convolution followed by field normalisation: the unit that fuses into one plain convolution."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from timm.layers import DropPath, register_notrace_module

from equivision_timm.layers.conv import SteerableConv2d
from equivision_timm.layers.conv_strategies.context import inference_only
from equivision_timm.layers.norm import FieldNorm
from equivision_timm.layers.stock import is_stock, no_global_hooks, remember

__all__ = ["ConvNorm", "fuses"]


@register_notrace_module  # as SteerableConv2d
class ConvNorm(nn.Module):
    """`SteerableConv2d`, then `FieldNorm`: [B, in_fields * H, ...] -> [B, out_fields * |G|, ...]; see there.

    In inference a batch norm is fused into the coefficients, and the two layers inside are not called, unless somebody
    would see it: see `fuses`.
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
            return (
                self.infer(x) if inference_only(x) and no_global_hooks() and self.fuses() else self.norm(self.conv(x))
            )

    @torch.jit.unused
    def infer(self, x: torch.Tensor, shortcut: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
        """The same where `inference_only` and `fuses`, with the normalisation in the coefficients.

        Args:
            x: as for `forward`.
            shortcut: is added to the output, or None.
            relu: whether to end with ReLU.
        """
        return self.conv.infer(x, self._fuse, self._statistics(), shortcut, relu)

    @torch.jit.unused
    def fuses(self) -> bool:
        """Whether the layers inside are what they were made as, and the norm is a linear map: one convolution."""
        return (
            is_stock(self.conv, SteerableConv2d)
            and is_stock(self.norm, FieldNorm)
            and is_stock(self.norm.per_field, nn.BatchNorm2d, nn.SyncBatchNorm)
            and not self.norm.per_field.training
            and self.norm.per_field.running_mean is not None
        )

    def _statistics(self) -> list[torch.Tensor]:
        norm = self.norm.per_field
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias, torch.tensor(norm.eps, device="cpu"))
        return [t for t in statistics if t is not None]

    def _fuse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w' = w gamma / sqrt(var + eps),  bias = beta - mean gamma / sqrt(var + eps), field by field."""
        norm = self.norm.per_field
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        scale = gamma * torch.rsqrt(norm.running_var + norm.eps)
        return weight * scale[:, None, None, None], beta - norm.running_mean * scale

    def fuse(self) -> nn.Module:
        """One `nn.Conv2d` with bias that computes the same in eval mode; called by timm's `reparameterize_model`.

        A norm that has no running statistics, or is no plain batch norm, stays behind the convolution. A layer that
        has hooks, or whose convolution was replaced, stays as it is.
        """
        if not is_stock(self, ConvNorm) or not is_stock(self.conv, SteerableConv2d):
            return self
        norm = self.norm.per_field
        batch_norm = is_stock(self.norm, FieldNorm) and is_stock(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
        if not batch_norm or norm.running_mean is None:
            return nn.Sequential(self.conv.fuse(), self.norm)
        return self.conv.plain_conv(*self._fuse(self.conv.weight))


remember(ConvNorm)


@torch.jit.unused
def fuses(
    x: torch.Tensor,
    units: Sequence[nn.Module],
    acts: Sequence[nn.Module],
    drop_path: nn.Module | None = None,
) -> bool:
    """Whether `ConvNorm.infer` may also add a shortcut and take the ReLU: nobody would see that modules are not called.

    Args:
        x: the input.
        units: the convolutions.
        acts: the activations behind them.
        drop_path: what lies between the last one and the shortcut, if anything does.
    """
    return (
        inference_only(x)
        and no_global_hooks()
        and all(is_stock(act, nn.ReLU) for act in acts)
        and (drop_path is None or _passes(drop_path))
        and all(is_stock(unit, ConvNorm) and unit.fuses() for unit in units)
    )


def _passes(drop_path: nn.Module) -> bool:
    """Whether it returns its input."""
    return is_stock(drop_path, nn.Identity) or (is_stock(drop_path, DropPath) and not drop_path.training)
