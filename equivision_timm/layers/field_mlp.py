"""Pointwise layers of regular fields, channels last and field-major: layer norm, MLP, global response norm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, register_notrace_module

from equivision_timm.layers.conv import is_watched
from equivision_timm.layers.irreps import irreps_of
from equivision_timm.layers.tokens import IrrepLinear
from equivision_timm.torch_state import has_sizes, leaves_python

__all__ = ["FieldGRN", "FieldLayerNorm", "FieldMlp"]

CHUNK = 1024  # pixels; in inference the hidden fields of as many stay in a CPU's cache
NARROW = 16  # fields; below, the backward pass in the irreps basis takes longer than dense products


class FieldLayerNorm(nn.Module):
    """Layer norm over the channels of each pixel, one scale and shift a field: maps [B, fields * |G|, H, W]."""

    def __init__(self, fields: int, order: int, eps: float, **dd: Any) -> None:
        super().__init__()
        self.order = order
        self.eps = eps
        self.weight: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight[:, None].expand(-1, self.order), self.bias[:, None].expand(-1, self.order)
        weight, bias = torch.stack([weight, bias]).flatten(1).unbind()  # of each channel, in one kernel
        return F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], weight, bias, self.eps).permute(0, 3, 1, 2)

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The plain layer norm, or itself if watched; for timm's `reparameterize_model`."""
        return self if is_watched(self) else self.plain()

    @torch.no_grad()
    def plain(self, element_major: bool = False) -> nn.Module:
        """The plain layer norm with constant weights, on element-major channels if so."""
        norm = LayerNorm2d(len(self.weight) * self.order, eps=self.eps, device="meta")
        for name, value in self.named_parameters():
            channels = value.repeat(self.order) if element_major else value.repeat_interleave(self.order)
            setattr(norm, name, nn.Parameter(channels, requires_grad=False))
        return norm.train(self.training)


class FieldGRN(nn.Module):
    """Global response normalisation of ConvNeXt V2, per field: the norm is over space and group.

    [B, H, W, fields * |G|] -> the same shape.
    """

    def __init__(self, fields: int, order: int, **dd: Any) -> None:
        super().__init__()
        self.order = order
        self.eps: float = 1e-6
        self.weight: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.on_elements(x.unflatten(-1, (-1, self.order)).movedim(-1, 0)).movedim(0, -1).flatten(-2)

    def on_elements(self, x: torch.Tensor) -> torch.Tensor:
        """The same of [|G|, B, H, W, fields]."""
        norm = torch.linalg.vector_norm(x, dim=[0, 2, 3], keepdim=True)  # [1, B, 1, 1, fields]
        norm = norm / (norm.mean(-1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias, self.weight, x * norm)


class FieldMlp(nn.Module):
    """Linear, activation, linear on regular fields: [B, H, W, fields * |G|] -> the same shape.

    The linear layers commute with the group. They are computed block diagonal in the irreps basis, or, if narrow and
    with gradients, as dense matrices: the same function. `act_layer` must be pointwise; `use_grn` adds global response
    normalisation after it.
    """

    def __init__(
        self,
        fields: int,
        hidden_fields: int,
        group: str,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        use_grn: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.narrow: bool = fields < NARROW
        self.fc1: IrrepLinear = IrrepLinear(fields, hidden_fields, group, "fields", "elements", **dd)
        self.act: nn.Module = act_layer()
        self.grn: FieldGRN | None = FieldGRN(hidden_fields, irreps_of(group).order, **dd) if use_grn else None
        self.fc2: IrrepLinear = IrrepLinear(hidden_fields, fields, group, "elements", "fields", **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights with the output variance of dense ones with deviation 0.02; zero bias."""
        for layer in (self.fc1, self.fc2):
            layer.reset_parameters(0.02 * layer.order**0.5, 0.02 * (layer.order / 2) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._mlp(x)
        else:
            if self.narrow and torch.is_grad_enabled() and not torch.jit.is_tracing():
                return self._dense_mlp(x)
            return _in_chunks(self._mlp, x) if self.grn is None else self._mlp(x)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.fc1(x))  # [|G|, B, H, W, hidden_fields]
        if self.grn is not None:
            x = self.grn.on_elements(x)
        return self.fc2(x)

    def _dense_mlp(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(F.linear(x, *self.fc1.dense()))  # [B, H, W, hidden_fields * |G|]
        if self.grn is not None:
            x = self.grn(x)
        return F.linear(x, *self.fc2.dense())


register_notrace_module(FieldMlp)  # one node if timm traces a model, which TorchScript can compile


def _in_chunks(mlp: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """mlp(x), in inference on a CPU chunk by chunk, but not while a graph is recorded."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or leaves_python()
    if recorded or not has_sizes(x) or x.device.type != "cpu":
        return mlp(x)
    return torch.cat([mlp(part) for part in x.flatten(0, -2).split(CHUNK)]).view(x.shape)
