"""Normalisation and scaling of tokens in the irreps basis."""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.layers.irreps import each_channel, irreps_of

__all__ = ["IrrepNorm", "IrrepScale"]


class IrrepNorm(nn.Module):
    """Layer norm of tokens in the irreps basis: [..., |G| * fields] -> the same shape; float32 inside for half types.

    Each irrep (of E each row) loses its mean over its channels; all are divided by

        std = sqrt((sum of var_i + eps) / |G|), var_i the variance of irrep i, of E the mean over the rows,

    then scaled, E's rows alike; the trivial irrep is shifted. The weights published for octic-vits were trained with
    just this sum. It counts E once, although E has two rows of two channels for one of A1: the variance of the regular
    basis would be the sum with 4 var_E. So at the start E comes out larger than the others by its share.

    Parameters: `weight` [scales * fields], `bias` [fields].

    Args:
        fields: number of fields.
        group: name of the group.
        eps: added to the sum of the variances.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: a group that square patches do not have.
    """

    def __init__(
        self,
        fields: int,
        group: str,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.fields = fields
        self.eps = eps
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.rows: int = irreps.rows
        self.multiplicity: int = irreps.multiplicity
        self.weight: nn.Parameter = nn.Parameter(torch.empty(irreps.scales * fields, device=device, dtype=dtype))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales 1, no shift."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = _at_least_float32(x).unflatten(-1, (self.order, self.fields))  # [..., |G|, fields]
        mean = blocks.mean(-1)  # [..., |G|]
        if self.rows > 0:
            row = mean[..., self.ones :].unflatten(-1, (self.rows, self.multiplicity)).mean(-1, keepdim=True)
            row = torch.cat([row] * self.multiplicity, -1).flatten(-2)  # [..., rows * multiplicity]
            mean = torch.cat([mean[..., : self.ones], row], -1)
        blocks = blocks - mean.unsqueeze(-1)
        power = blocks.square().mean(-1)  # [..., |G|]
        total = power[..., : self.ones].sum(-1)
        if self.rows > 0:
            total = total + power[..., self.ones :].mean(-1)  # var_E: mean over rows and channels
        inverse_std = torch.rsqrt((total + self.eps) / self.order)
        y = blocks.flatten(-2) * inverse_std.unsqueeze(-1)
        weight = each_channel(self.weight, self.multiplicity * self.fields)
        bias = F.pad(self.bias, [0, (self.order - 1) * self.fields])
        return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.fields}, eps={self.eps}"


register_notrace_module(IrrepNorm)  # one node where timm traces a model for its features


@torch.fx.wrap  # asks for the type: one node in a graph of torch.fx
def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x


class IrrepScale(nn.Module):
    """LayerScale of tokens in the irreps basis: a learned factor for each channel, the same for both rows of E.

    Parameter: `gamma` [scales * fields].

    Args:
        fields: number of fields.
        group: name of the group.
        init_values: the factors at the start.
        device: where to create the parameters.
        dtype: their type.
    """

    def __init__(
        self,
        fields: int,
        group: str,
        init_values: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.init_values = init_values
        self.plane: int = irreps.multiplicity * fields
        self.gamma: nn.Parameter = nn.Parameter(torch.empty(irreps.scales * fields, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All factors `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * each_channel(self.gamma, self.plane)
