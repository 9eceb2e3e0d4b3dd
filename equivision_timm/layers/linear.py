"""Linear maps of tokens that commute with the group."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from equivision_timm.layers.irreps import irreps_of

__all__ = ["IrrepLinear"]


class IrrepLinear(nn.Module):
    """Linear layer of tokens in the irreps basis: [..., |G| * in_fields] -> [..., |G| * out_fields].

    By Schur's lemma one matrix for each one-dimensional irrep, and for E one on the multiplicity, the same for both
    rows; where E is of complex type (C4) two, W x + V J x with J the rotation by 90 degrees. The bias is on the trivial
    irrep alone. A D4 layer has 1/8 of the weights of a dense one and 3/16 of its multiply-accumulates.

    Parameters: `weight` [ones, out_fields, in_fields]; `weight_plane` [multiplicity * out_fields,
    multiplicity * in_fields], in C4 [2, out_fields, in_fields], None where there is no E; `bias` [out_fields].

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        group: name of the group, such as 'd4'.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: a group that square patches do not have.

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapter 2.
    """

    def __init__(self, in_fields: int, out_fields: int, group: str, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        irreps = irreps_of(group)
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.group = group
        self.ones = irreps.ones
        self.rows = irreps.rows
        self.multiplicity = irreps.multiplicity
        self.weight = nn.Parameter(torch.empty(irreps.ones, out_fields, in_fields, **dd))
        self.weight_plane = None
        if irreps.multiplicity == 2:
            self.weight_plane = nn.Parameter(torch.empty(2 * out_fields, 2 * in_fields, **dd))
        elif irreps.multiplicity == 1:
            self.weight_plane = nn.Parameter(torch.empty(2, out_fields, in_fields, **dd))
        self.bias = nn.Parameter(torch.empty(out_fields, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, as ViTs start with, and no bias."""
        trunc_normal_(self.weight, std=0.02)
        if self.weight_plane is not None:
            trunc_normal_(self.weight_plane, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # [..., |G| * in] -> [T, |G| * in]
        ones = tokens[:, : self.ones * self.in_fields].unflatten(1, (self.ones, self.in_fields))  # [T, ones, in]
        y = torch.bmm(ones.transpose(0, 1), self.weight.transpose(1, 2))  # [ones, T, out]
        blocks = [y[0] + self.bias]
        for i in range(1, self.ones):
            blocks.append(y[i])  # noqa: PERF401  (TorchScript)
        weight = self.weight_plane
        if weight is not None:
            plane = tokens[:, self.ones * self.in_fields :]  # [T, 2 * multiplicity * in]
            if self.multiplicity == 1:
                w, v = weight[0], weight[1]
                both = torch.cat([torch.cat([w, -v], 1), torch.cat([v, w], 1)])  # W + V J, [2 * out, 2 * in]
                blocks.append(F.linear(plane, both))
            else:
                first, second = plane.chunk(2, 1)  # the rows, [T, 2 * in] each
                blocks.append(F.linear(first, weight))
                blocks.append(F.linear(second, weight))
        return torch.cat(blocks, 1).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_fields}, {self.out_fields}, group={self.group!r}"
