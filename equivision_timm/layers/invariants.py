"""From tokens in the irreps basis to ordinary tokens, invariant under the group."""

import torch
import torch.nn as nn

from equivision_timm.errors import check_choice
from equivision_timm.layers.irreps import Device, DType, irreps_of

__all__ = ["INVARIANTS", "Invariants"]

INVARIANTS = ("power", "polynomial", "trivial", "")


class Invariants(nn.Module):
    """Invariants of each channel of tokens in the irreps basis, projected: [..., |G| * fields] -> [..., dim].

    - 'power': the trivial irrep, the absolute values of the other one-dimensional ones, the length of E for each of its
      multiplicity; scales * fields numbers. Their gradient at zero is zero.
    - 'polynomial': 32 polynomials of degree 1 to 4 for each field of D4, which generate all its invariant polynomials;
      in the order of octic-vits (https://github.com/davnords/octic-vits), whose DeiT III models use them.
    - 'trivial': only the trivial irrep; fields numbers, not projected.
    - '': NOT invariant, the channels themselves, for hybrids: those of E copy by copy, E0+ E1+ E0- E1-; not projected.
    """

    def __init__(
        self, kind: str, fields: int, group: str, dim: int, device: Device = None, dtype: DType = None
    ) -> None:
        super().__init__()
        irreps = irreps_of(group)
        check_choice("invariants", kind, INVARIANTS)
        if kind == "polynomial" and group != "d4":
            raise ValueError(f"invariants 'polynomial' need group 'd4', but the group is {group!r}: use 'power'")
        self.kind = kind
        self.fields = fields
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.rows: int = irreps.rows
        count = {"power": irreps.scales, "polynomial": 32}.get(kind)
        self.proj: nn.Module = nn.Linear(count * fields, dim, device=device, dtype=dtype) if count else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.invariants(x))

    def invariants(self, x: torch.Tensor) -> torch.Tensor:
        """The invariants before the projection."""
        trivial, ones = x[..., : self.fields], x[..., self.fields : self.ones * self.fields]
        if self.kind == "trivial":
            return trivial
        if self.kind == "polynomial":
            return torch.cat(_polynomials(x.unflatten(-1, (self.order, self.fields))), -1)
        parts = [trivial, ones.abs() if self.kind == "power" else ones]
        if self.rows > 0:
            plane = x[..., self.ones * self.fields :].unflatten(-1, (self.rows, -1))  # [..., 2, multiplicity * fields]
            if self.kind == "power":
                parts.append(torch.linalg.vector_norm(plane, dim=-2))
            else:
                parts.append(plane.unflatten(-1, (-1, self.fields)).transpose(-3, -2).flatten(-3))
        return torch.cat(parts, -1)

    def extra_repr(self) -> str:
        return f"{self.kind!r}"


def _polynomials(x: torch.Tensor) -> list[torch.Tensor]:
    """32 invariants [..., fields] of x [..., 8, fields].

    With u = (u0, u1) and v = (v0, v1) for the two copies of E, g acts on both as on the plane; so u.u, u.v, v.v are
    invariant, u x v transforms as A2, u0^2 - u1^2 and its like as B1, u0 u1 as B2. Products of irreps that end in A1.
    """
    a1, a2, b1, b2, u0, v0, u1, v1 = x.unbind(-2)
    uu0, uu1, uv0, uv1, vv0, vv1 = u0 * u0, u1 * u1, u0 * v0, u1 * v1, v0 * v0, v1 * v1
    as_a1 = [vv0 + vv1, uv0 + uv1, uu0 + uu1]
    as_b1 = [vv0 - vv1, uv0 - uv1, uu0 - uu1]
    as_b2 = [v0 * v1, u1 * v0 + u0 * v1, u0 * u1]
    as_a2 = u1 * v0 - u0 * v1
    pairs = [(vv0, vv0, vv1, vv1), (uv0, vv0, uv1, vv1), (uu0, vv0, uu1, vv1), (uu0, uv0, uu1, uv1)]
    pairs += [(uu0, uu0, uu1, uu1)]
    quartic_as_a2 = [as_b2[0] * as_b1[0], u1 * v0 * vv0 - u0 * v1 * vv1]
    quartic_as_a2 += [as_b2[2] * as_b1[0], u1 * v0 * uu0 - u0 * v1 * uu1, as_b2[2] * as_b1[2]]
    terms = [a1] + as_a1 + [b2 * b2, b1 * b1, a2 * a2]  # noqa: RUF005  (TorchScript)
    terms += [b2 * p for p in as_b2] + [b1 * p for p in as_b1] + [a2 * as_a2, a2 * b1 * b2]
    terms += [p0 * q0 + p1 * q1 for p0, q0, p1, q1 in pairs] + [b1 * b2 * as_a2]
    terms += [a2 * b2 * p for p in as_b1] + [a2 * b1 * p for p in as_b2] + [a2 * p for p in quartic_as_a2]
    return terms
