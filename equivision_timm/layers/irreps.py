"""Tokens in the irreps basis: the layout of their channels, and the change to the regular basis.

A token of `fields` regular fields has |G| * fields channels. In the irreps basis they are |G| blocks of `fields`
channels each: first the one-dimensional irreps (D4: A1, A2, B1, B2), on which an element g acts by a sign; then, if the
group has rotations by 90 degrees, the two rows of the plane E, on which g acts as on the vectors of the plane. A field
of C4 contains E once, one of D4 twice (the blocks + and - of a row): [A1 A2 B1 B2 E0+ E0- E1+ E1-].

Only groups that map a square grid onto itself have such tokens: rotations by multiples of 90 degrees, reflections.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.fx
import torch.nn as nn
from timm.layers import register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import Group

__all__ = ["ChangeBasis", "DType", "Device", "Irreps", "irreps_matrix", "irreps_of", "plane_matrices"]

Device: TypeAlias = torch.device | str | None
DType: TypeAlias = torch.dtype | None


@dataclass(frozen=True)
class Irreps:
    """Decomposition of a regular field into irreps."""

    group: Group
    ones: int  # number of one-dimensional irreps, the trivial one first
    rows: int  # dimension of E, 2; 0 if the group has no rotation by 90 degrees
    multiplicity: int  # how often E occurs in a field

    @property
    def order(self) -> int:
        """|G|, the number of blocks."""
        return self.group.order

    @property
    def scales(self) -> int:
        """Number of blocks with a scale of their own; the two rows of E share theirs."""
        return self.ones + self.multiplicity


@cache
def irreps_of(name: str) -> Irreps:
    """The irreps of the group called `name`; ValueError unless it maps a square grid onto itself."""
    group = Group.from_name(name)
    if len(group.grid_elements) != group.order:
        raise ValueError(
            f"group {name!r} has rotations by {360 / group.rotations:g} degrees, which do not map a square grid onto "
            "itself: use 'd1', 'c4', 'd4', or another group with rotations by multiples of 90 degrees"
        )
    planes = [copies for size, copies in group.irreps() if size == 2]
    return Irreps(group, len(group.irreps()) - len(planes), 2 * len(planes), sum(planes))


def plane_matrices(group: Group) -> torch.Tensor:
    """P [|G|, 2, 2] float64: the action of r^k f^p on the plane, R(90 k degrees) diag(-1, 1)^p."""
    rotation, reflection = torch.tensor([[[0.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    powers = [torch.linalg.matrix_power(rotation, group.quarter_turns(k) or 0) for k in range(group.rotations)]
    return torch.stack(powers + [power @ reflection for power in powers if group.reflections])


@constant
def irreps_matrix(group: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Q [|G|, |G|], orthogonal: a function on the group -> its coefficients, f^ = Q f, blocks as above.

    Rows: the signs; then, for each row a of P, P_a0 + P_a1 and P_a0 - P_a1 (multiplicity 2), or P_a0 (1). The sum and
    the difference give D4 entries of equal size, +-1 / sqrt(8). Only this basis of the multiplicity differs from
    `Group.fourier_matrix`: it is that of octic-vits (https://github.com/davnords/octic-vits), whose norms and
    invariants depend on it.

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapter 2.
    """
    irreps = irreps_of(group)
    rows = list(irreps.group.fourier_matrix()[: irreps.ones].sign())
    if irreps.rows:
        for row in plane_matrices(irreps.group).unbind(1):  # P_a, [|G|, 2]
            rows += [row[:, 0] + row[:, 1], row[:, 0] - row[:, 1]] if irreps.multiplicity == 2 else [row[:, 0]]
    matrix = torch.stack(rows)
    return (matrix / matrix.norm(dim=1, keepdim=True)).to(device, dtype)


class ChangeBasis(nn.Module):
    """From tokens [..., |G| * fields] in the irreps basis to field-major regular fields [..., fields * |G|], or back.

    A field is f = Q^T f^, f^ = Q f. In the regular basis the group permutes the |G| values of a field, so pointwise
    functions commute with it.

    Args:
        to: 'regular' or 'irreps'.
    """

    def __init__(self, group: str, to: str) -> None:
        super().__init__()
        self.group = group
        self.order: int = irreps_of(group).order
        self.to_basis = to
        self._matrix = irreps_matrix(group, torch.float64, torch.device("cpu"))  # not state; for TorchScript

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self._matrix.to(x) if torch.jit.is_scripting() else _matrix_like(x, self.group)
        fields = x.shape[-1] // self.order
        if self.to_basis == "regular":
            return (x.unflatten(-1, (self.order, fields)).transpose(-2, -1) @ q).flatten(-2)
        return (x.unflatten(-1, (fields, self.order)) @ q.t()).transpose(-2, -1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.group!r}, to={self.to_basis!r}"


register_notrace_module(ChangeBasis)  # one node if timm traces a model for its features


@torch.fx.wrap  # reads dtype and device of x: one node in a graph of torch.fx
def _matrix_like(x: torch.Tensor, group: str) -> torch.Tensor:
    return constant_like(x, irreps_matrix, group)
