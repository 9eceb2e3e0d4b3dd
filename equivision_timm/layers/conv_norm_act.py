"""The unit that networks are made of: act(drop(attn(norm(conv(x)))) + shortcut)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torchvision.ops import FrozenBatchNorm2d

from equivision_timm.groups import Group
from equivision_timm.layers.blur import Blur2d
from equivision_timm.layers.conv import SteerableConv2d, is_watched
from equivision_timm.layers.norm import FieldBatchNorm2d, FieldNorm

__all__ = ["ConvNormAct"]

_FOLDABLE = (FieldBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class ConvNormAct(nn.Module):
    """Convolution, norm, attention, drop, shortcut, activation: act(drop(attn(norm(conv(x)))) + shortcut).

    Input [B, in_fields * H, height, width], output [B, out_fields * |G|, height', width'], as `SteerableConv2d`; the
    shortcut has the shape of the output. Arguments that are not listed are those of `SteerableConv2d`.

    Args:
        norm_layer: normalisation wrapped by `FieldNorm`.
        act_layer: pointwise activation; None for none.
        attn: attention of the output fields before the shortcut, such as `FieldAttention`; None for none.
        drop: drops parts of the branch in training, such as timm's `DropPath`; None for none.
        even: whether, for a stride of 2, a map of even length n becomes one of n - 1 first, by the mean of neighbours,
            so that the stride keeps the outermost pixels on both sides; along the axes that the group reverses.
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
        even: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.even: nn.Module = nn.Identity()
        if even and stride > 1:
            self.even = Blur2d(taps=1, stride=1, even=Group.from_name(group).reversed_axes)
        self.conv: SteerableConv2d = SteerableConv2d(
            in_fields, out_fields, kernel_size, group, input_type, stride, dilation, "auto", cutoff, low_pass, **dd
        )
        self.norm: FieldNorm = FieldNorm(out_fields, self.conv.order, norm_layer, **dd)
        self.attn: nn.Module = nn.Identity() if attn is None else attn
        self.drop: nn.Module = nn.Identity() if drop is None else drop
        self.act: nn.Module = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(self.attn(self.norm(self.conv(self.even(x)))))
        if shortcut is not None:
            x += shortcut  # in place, as in timm's ResNets
        return self.act(x)

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """Make convolution and norm one `nn.Conv2d` in place; called by timm's `reparameterize_model` on its copy.

        Constant weights, the same output in eval mode. A norm that is not a batch norm with running statistics stays
        after the convolution; a unit whose convolution was replaced, or that has hooks inside, stays as it is.
        """
        return self.replace_conv(SteerableConv2d.dense_conv)

    @torch.jit.unused
    def replace_conv(self, make: Callable[..., nn.Module]) -> nn.Module:
        """Let `make(conv, weight, bias)` compute norm(conv(x)) with constant weights; returns the unit."""
        if not self.is_fusible():
            return self
        folded = self.folded()
        weight, bias = (self.conv.weight, None) if folded is None else folded
        self.add_module("conv", make(self.conv, weight, bias).train(self.training))
        if folded is not None:
            self.add_module("norm", nn.Identity())
        return self

    @torch.jit.unused
    def is_fusible(self) -> bool:
        """Whether the convolution is a `SteerableConv2d`, and neither it nor the norm is watched."""
        inner = [*self.conv.modules(), *self.norm.modules()]
        return isinstance(self.conv, SteerableConv2d) and not any(map(is_watched, inner))

    @torch.no_grad()
    def folded(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Coefficients [O, I, n_basis, 1] and bias [O] of norm(conv(x)); None unless a batch norm in eval mode.

        w' = w gamma / sqrt(var + eps),  bias = beta - mean gamma / sqrt(var + eps), field by field
        """
        norm: Any = self.norm.per_field if type(self.norm) is FieldNorm else None
        if type(norm) not in _FOLDABLE or norm.running_mean is None:
            return None
        mean, var = norm.running_mean, norm.running_var
        gamma = torch.ones_like(var) if norm.weight is None else norm.weight
        beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
        scale = gamma * torch.rsqrt(var + norm.eps)
        return self.conv.weight * scale[:, None, None, None], beta - mean * scale
