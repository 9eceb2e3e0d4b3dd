"""Linear maps of tokens that commute with the group."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from equivision_timm.layers.irreps import irreps_of

__all__ = ["IrrepLinear"]


class IrrepLinear(nn.Module):
    """Linear layer of tokens in the irreps basis, from tokens to blocks or back.

    Tokens are [..., |G| * fields], the form of the residual stream; blocks [|G|, ..., fields], the form in which what
    lies between two linear layers is computed: whole matrices for the change of basis and for each irrep, no copies.

    By Schur's lemma one matrix for each one-dimensional irrep, and for E one on the multiplicity, the same for both
    rows; where E is of complex type (C4) two, W x + V J x with J the rotation by 90 degrees. The bias is on the trivial
    irrep alone. A D4 layer has 1/8 of the weights of a dense one and 3/16 of its multiply-accumulates.

    Parameters: `weight` [ones, out_fields, in_fields]; `weight_plane` [2 * out_fields, 2 * in_fields], in C4
    [2, out_fields, in_fields], None where there is no E; `bias` [out_fields].

    Args:
        in_fields: number of input fields.
        out_fields: number of output fields.
        group: name of the group, such as 'd4'.
        to: 'blocks', of tokens, or 'tokens', of blocks.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: a group that square patches do not have.

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapter 2.
    """

    def __init__(
        self,
        in_fields: int,
        out_fields: int,
        group: str,
        to: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        irreps = irreps_of(group)
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.group = group
        self.to_form = to
        self.ones: int = irreps.ones
        self.multiplicity: int = irreps.multiplicity
        self.weight: nn.Parameter = nn.Parameter(torch.empty(irreps.ones, out_fields, in_fields, **dd))
        self.weight_plane: nn.Parameter | None = None
        if irreps.multiplicity == 2:
            self.weight_plane = nn.Parameter(torch.empty(2 * out_fields, 2 * in_fields, **dd))
        elif irreps.multiplicity == 1:
            self.weight_plane = nn.Parameter(torch.empty(2, out_fields, in_fields, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(out_fields, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of deviation 0.02, as ViTs start with, and no bias."""
        trunc_normal_(self.weight, std=0.02)
        if self.weight_plane is not None:
            trunc_normal_(self.weight_plane, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._to_blocks(x) if self.to_form == "blocks" else self._to_tokens(x)

    def _to_blocks(self, x: torch.Tensor) -> torch.Tensor:
        widths = [self.in_fields] * self.ones + [2 * self.in_fields] * self.multiplicity
        parts = x.flatten(0, -2).split(widths, 1)  # of [T, |G| * in]; D4: each row of E at once, C4: both
        blocks = [F.linear(parts[0], self.weight[0], self.bias)]  # [T, out]
        for i in range(1, self.ones):
            blocks.append(F.linear(parts[i], self.weight[i]))  # noqa: PERF401  (TorchScript)
        if self.weight_plane is not None:
            first, second = self._plane_matrix(self.weight_plane).chunk(2)  # [out, 2 * in]
            for i in range(self.ones, self.ones + self.multiplicity):
                blocks.append(F.linear(parts[i], first))
                blocks.append(F.linear(parts[i], second))
        return torch.stack(blocks).unflatten(1, x.shape[:-1])  # [|G|, T, out] -> [|G|, ..., out]

    def _to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.flatten(1, -2).unbind(0)  # |G| times [T, in]
        tokens = [F.linear(blocks[0], self.weight[0], self.bias)]  # [T, out]
        for i in range(1, self.ones):
            tokens.append(F.linear(blocks[i], self.weight[i]))  # noqa: PERF401  (TorchScript)
        if self.weight_plane is not None:
            first, second = self._plane_matrix(self.weight_plane).chunk(2, 1)  # [2 * out, in]
            for i in range(self.ones, self.ones + 2 * self.multiplicity, 2):
                row = torch.addmm(F.linear(blocks[i], first), blocks[i + 1], second.t())  # [T, 2 * out]
                tokens.append(row)
        return torch.cat(tokens, 1).unflatten(0, x.shape[1:-1])  # [T, |G| * out] -> [..., |G| * out]

    def _plane_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix on pairs of blocks of E, [2 * out, 2 * in]: D4's as it is, C4's W + V J."""
        if self.multiplicity == 2:
            return weight
        w, v = weight[0], weight[1]
        return torch.cat([torch.cat([w, -v], 1), torch.cat([v, w], 1)])

    def extra_repr(self) -> str:
        return f"{self.in_fields}, {self.out_fields}, group={self.group!r}, to={self.to_form!r}"
