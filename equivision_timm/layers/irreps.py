"""Tokens in the irreps basis: how the channels lie, and the change to the regular basis.

A token of `fields` regular fields has |G| * fields channels. In the irreps basis they are |G| blocks of `fields`
channels each: first the one-dimensional irreps (D4: A1, A2, B1, B2), on which an element g acts by a sign; then, where
the group rotates by 90 degrees, the two rows of the plane E, on which g acts as on the vectors of the plane. D4 holds E
twice in every field (multiplicity 2, the blocks + and - of a row), C4 once. So D4: [A1 A2 B1 B2 E0+ E0- E1+ E1-].

Only groups that map a square grid onto itself have such tokens: rotations by multiples of 90 degrees, reflections.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.fx
import torch.nn as nn
from timm.layers import register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import Group

__all__ = ["ChangeBasis", "Irreps", "each_channel", "irreps_matrix", "irreps_of", "plane_matrices", "signs"]


@dataclass(frozen=True)
class Irreps:
    """What one regular field decomposes into.

    Attributes:
        group: the group.
        ones: number of one-dimensional irreps, the trivial one first.
        rows: dimension of E, 2; or 0 where the group has no rotation by 90 degrees.
        multiplicity: how often E occurs in a field.
    """

    group: Group
    ones: int
    rows: int
    multiplicity: int

    @property
    def order(self) -> int:
        """|G|, the number of blocks."""
        return self.group.order

    @property
    def scales(self) -> int:
        """Blocks that may be scaled by themselves: all, but for E's rows, which share theirs."""
        return self.ones + self.multiplicity


@cache
def irreps_of(name: str) -> Irreps:
    """The irreps of the group called `name`.

    Raises:
        ValueError: an unknown group, or one that does not map a square grid onto itself.
    """
    group = Group.from_name(name)
    if len(group.grid_elements) != group.order:
        raise ValueError(
            f"group {name!r} has rotations by {360 / group.rotations:g} degrees, which square patches do not have: "
            "use 'd1', 'c4', 'd4', or another group with rotations by multiples of 90 degrees"
        )
    planes = [copies for size, copies in group.irreps() if size == 2]
    return Irreps(
        group=group,
        ones=len(group.irreps()) - len(planes),
        rows=2 * len(planes),
        multiplicity=sum(planes),
    )


def plane_matrices(group: Group) -> torch.Tensor:
    """P [|G|, 2, 2] float64: how r^k f^p acts on the plane, R(90 k degrees) diag(-1, 1)^p."""
    quarter_turns = [turns for g in range(group.order) if (turns := group.quarter_turns(g)) is not None]  # of all g
    cos = torch.tensor([(1.0, 0.0, -1.0, 0.0)[k] for k in quarter_turns], dtype=torch.float64, device="cpu")
    sin = torch.tensor([(0.0, 1.0, 0.0, -1.0)[k] for k in quarter_turns], dtype=torch.float64, device="cpu")
    first = torch.tensor([-1.0 if g >= group.rotations else 1.0 for g in range(group.order)], dtype=torch.float64)
    rows = [torch.stack([cos * first, -sin], dim=1), torch.stack([sin * first, cos], dim=1)]  # of R diag(-1, 1)^p
    return torch.stack(rows, dim=1)


def signs(group: Group) -> torch.Tensor:
    """[ones, |G|] float64: the one-dimensional irreps, in D4 A1 (r +, f +), A2 (+ -), B1 (- +), B2 (- -)."""
    elements = torch.arange(group.order, dtype=torch.float64, device="cpu")
    reflection = 1 - 2 * (elements >= group.rotations).double()
    rotation = 1 - 2 * (elements % 2)  # the number of rotations is even where this is used
    rotations = [torch.ones_like(elements), rotation] if group.rotations % 2 == 0 else [torch.ones_like(elements)]
    return torch.stack([s for sign in rotations for s in ([sign, sign * reflection] if group.reflections else [sign])])


def _matrix(group: Group) -> torch.Tensor:
    """Q [|G|, |G|] float64, orthogonal: a function on the group -> its coefficients, f^ = Q f, blocks as above.

    Rows: the signs; then, for each row a of P, P_a0 + P_a1 and P_a0 - P_a1 (multiplicity 2), or P_a0 (1). The sum and
    the difference give D4 entries of one size, +-1 / sqrt(8).

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapter 2; the basis of E's multiplicity
    is that of octic-vits (https://github.com/davnords/octic-vits), so that its weights mean the same here.
    """
    rows = list(signs(group))
    if irreps_of(group.name).rows:
        for row in plane_matrices(group).unbind(1):  # P_a, [|G|, 2]
            rows += [row[:, 0] + row[:, 1], row[:, 0] - row[:, 1]] if group.reflections else [row[:, 0]]
    matrix = torch.stack(rows)
    return matrix / matrix.norm(dim=1, keepdim=True)


@constant
def irreps_matrix(group: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Q of `_matrix`, in `dtype` on `device`."""
    return _matrix(irreps_of(group).group).to(device, dtype)


def each_channel(scales: torch.Tensor, plane: int) -> torch.Tensor:
    """Factors [scales * fields] -> one for each channel, [|G| * fields]: the last `plane` serve both rows of E."""
    return torch.cat([scales, scales[scales.shape[0] - plane :]])


class ChangeBasis(nn.Module):
    """From the irreps basis to the regular one or back: [|G|, ..., fields] -> the same shape, along the first axis.

    f = Q^T f^ and f^ = Q f. In the regular basis the group permutes the |G| values of a field.

    Args:
        group: name of the group.
        to: 'regular' or 'irreps'.
    """

    def __init__(self, group: str, to: str) -> None:
        super().__init__()
        self.group = group
        self.to_basis = to
        self._matrix = irreps_matrix(group, torch.float64, torch.device("cpu"))  # no state: for TorchScript

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            matrix = self._matrix.to(x)
            matrix = matrix.t() if self.to_basis == "regular" else matrix
            return torch.mm(matrix, x.flatten(1)).unflatten(1, x.shape[1:])
        else:
            return _change_basis(x, self.group, self.to_basis)

    def extra_repr(self) -> str:
        return f"{self.group!r}, to={self.to_basis!r}"


register_notrace_module(ChangeBasis)  # one node where timm traces a model for its features


@torch.fx.wrap  # asks for type and device: one node in a graph of torch.fx
def _change_basis(x: torch.Tensor, group: str, to: str) -> torch.Tensor:
    """f = Q^T f^ or f^ = Q f: x [|G|, ..., fields] as [|G|, values], times [|G|, |G|], and back to its shape."""
    matrix = constant_like(x, irreps_matrix, group)
    matrix = matrix.t() if to == "regular" else matrix
    return torch.mm(matrix, x.flatten(1)).unflatten(1, x.shape[1:])
