"""The finite groups of the plane, C_N and D_N: elements, product, regular representation, action on images.

C_N holds the rotations by 360/N degrees; D_N adds the reflections (order 2N). An element is r^k f^p, the reflection
f : (x, y) -> (-x, y) applied p times, then the rotation r by 360/N degrees, counter-clockwise, applied k times; its
index is p * N + k. The order of elements, the axis of reflection and the names are those of escnn (`C_N`:
`gspaces.rot2dOnR2(N)`, `D_N`: `gspaces.flipRot2dOnR2(N)`, `D_1`: `gspaces.flip2dOnR2()`), so that a feature map is a
`GeometricTensor` without any change.
"""

import math
import re
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache

import torch

__all__ = ["Group", "circle", "move_pixels"]

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


@cache
def circle(n: int) -> tuple[tuple[float, float], ...]:
    """(cos, sin) of k/n of a full rotation, k = 0 ... n - 1, correctly rounded."""
    with localcontext(Context(prec=60)):
        cos, sin, term = Decimal(0), Decimal(0), Decimal(1)  # exp(i x) = sum_m (i x)^m / m!, x = 2 pi / n
        for m in range(80):
            if m % 2:
                sin += term if m % 4 == 1 else -term
            else:
                cos += term if m % 4 == 0 else -term
            term *= 2 * _PI / n / (m + 1)
        points = [(Decimal(1), Decimal(0))]
        for _ in range(n - 1):
            a, b = points[-1]
            points.append((a * cos - b * sin, a * sin + b * cos))
        return tuple((float(round(a, 45)) + 0.0, float(round(b, 45)) + 0.0) for a, b in points)  # + 0.0: no -0.0


def move_pixels(x: torch.Tensor, quarter_turns: int, reflect: bool = False) -> torch.Tensor:
    """x [..., H, W] reflected, left and right swapped, then rotated counter-clockwise by 0 to 3 quarter turns.

    By transposes and flips, since exporters to ONNX may lack rot90.
    """
    x = x.flip(-1) if reflect else x
    if quarter_turns == 2:
        return x.flip([-2, -1])
    if quarter_turns == 0:
        return x
    return x.transpose(-2, -1).flip(-2 if quarter_turns == 1 else -1)


@dataclass(frozen=True)
class Group:
    """A cyclic group C_N or a dihedral group D_N acting on the plane; N = `rotations`, D_N if `reflections`."""

    rotations: int
    reflections: bool

    @classmethod
    def from_name(cls, name: str) -> "Group":
        """The group with this name: `c8` is C_8, `d4` is D_4.

        Example:
            >>> Group.from_name("d4").order
            8
        """
        match = re.fullmatch(r"([cd])([1-9]\d*)", name) if isinstance(name, str) else None
        if match is None:
            raise ValueError(f"unknown group {name!r}: use 'cN' (N rotations) or 'dN' (and N reflections), e.g. 'c8'")
        return cls(rotations=int(match[2]), reflections=match[1] == "d")

    @property
    def name(self) -> str:
        """'c8' for C_8, 'd4' for D_4; see `from_name`."""
        return f"{'d' if self.reflections else 'c'}{self.rotations}"

    @property
    def order(self) -> int:
        """|G|, the number of elements."""
        return self.rotations * (2 if self.reflections else 1)

    def product(self, a: int, b: int) -> int:
        """Index of the element a b: (r^k f^p)(r^l f^q) = r^(k + (-1)^p l) f^(p + q)."""
        (p, k), (q, m) = divmod(a, self.rotations), divmod(b, self.rotations)
        return (p + q) % 2 * self.rotations + (k + (-m if p else m)) % self.rotations

    def inverse(self, a: int) -> int:
        """Index of a^-1: a reflection is its own inverse, that of r^k is r^-k."""
        p, k = divmod(a, self.rotations)
        return a if p else -k % self.rotations

    def left_quotients(self) -> torch.Tensor:
        """[|G|, |G|] int64, entry [g, h] is the index of g^-1 h; kernels and fields are permuted by it."""
        elements = range(self.order)
        return torch.tensor([[self.product(self.inverse(g), h) for h in elements] for g in elements], device="cpu")

    def irreps(self) -> tuple[tuple[int, int], ...]:
        """(size, copies) of each block of `fourier_matrix`: the one-dimensional irreps, then those of dimension 2.

        A map of fields that commutes with the group is, in the irreps basis, one matrix [size, size] for each block,
        shared by its copies (Schur's lemma). C_N: two-dimensional irreps are of complex type and occur once; D_N: of
        real type, twice.
        """
        n = self.rotations
        ones = (1 if n % 2 else 2) * (2 if self.reflections else 1)
        return ((1, 1),) * ones + ((2, 2 if self.reflections else 1),) * ((n - 1) // 2)

    def fourier_matrix(self) -> torch.Tensor:
        """Q [|G|, |G|] float64, orthogonal: coefficients of a function on the group in the irreps basis, f^ = Q f.

        Q[(rho, a, b), h] = sqrt(d / |G|) rho_ab(h), d the dimension of rho: (g f)(h) = f(g^-1 h) is
        transformed by rho(g) in a, not in b; so a counts the copies of D_N's blocks and b the rows inside. C_N, whose
        rho of dimension 2 are complex, has rows cos and sin in one copy. Blocks in the order of `irreps`.

        Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapters 2 and 5.
        """
        n = self.rotations
        points = torch.tensor(circle(n), dtype=torch.float64, device="cpu")
        one, two = (math.sqrt(d / self.order) for d in (1, 2))  # the factors for d = 1 and 2
        rows = []
        for k in [0] if n % 2 else [0, n // 2]:  # one-dimensional irreps of the rotations: 1, and (-1)^t
            sign = one * points[[k * t % n for t in range(n)], 0]
            rows += [torch.cat([sign, sign]), torch.cat([sign, -sign])] if self.reflections else [sign]
        for k in range(1, (n - 1) // 2 + 1):
            cos, sin = two * points[[k * t % n for t in range(n)]].T
            if self.reflections:  # rho(r^t f^p) = [[cos, -sin], [sin, cos]] diag(1, -1)^p, entry by entry
                rows += [torch.cat(pair) for pair in ((cos, cos), (-sin, sin), (sin, sin), (cos, -cos))]
            else:
                rows += [cos, sin]
        return torch.stack(rows)

    def quarter_turns(self, g: int) -> int | None:
        """The rotation part of `g` in units of 90 degrees; None if it is not a multiple of 90 degrees."""
        turns, remainder = divmod(4 * (g % self.rotations), self.rotations)
        return None if remainder else turns

    @property
    def reversed_axes(self) -> tuple[bool, bool]:
        """Whether an element of `grid_elements` reverses the height of a map, and the width ('d1': only the width)."""
        elements = [g for g in self.grid_elements if g]
        return any(g % self.rotations for g in elements), bool(elements)

    def reversed_sides(self, height: int, width: int) -> list[int]:
        """The sides of a map along its `reversed_axes`."""
        return [side for side, is_reversed in zip((height, width), self.reversed_axes, strict=True) if is_reversed]

    @property
    def grid_elements(self) -> list[int]:
        """The elements that map a square pixel grid onto itself: quarter turns, and reflections followed by them."""
        return [g for g in range(self.order) if self.quarter_turns(g) is not None]

    def transform_image(self, image: torch.Tensor, g: int) -> torch.Tensor:
        """Transform `image` [..., H, W], H = W, by the element `g` of `grid_elements`."""
        turns = self.quarter_turns(g)
        if turns is None:
            raise ValueError(f"element {g} of {self.name} does not map the grid to itself: use {self.grid_elements}")
        return move_pixels(image, turns, g >= self.rotations)

    def transform_fields(self, features: torch.Tensor, g: int) -> torch.Tensor:
        """Transform regular fields [B, m * |G|, H, W], field-major, H = W, by the element `g` of `grid_elements`.

        The pixels, and the channels of each field: (g f)[h] = g . f[g^-1 h].
        """
        fields = features.unflatten(1, (-1, self.order))  # [B, m, |G|, H, W]
        permuted = fields[:, :, self.left_quotients()[g].to(features.device)]
        return self.transform_image(permuted.flatten(1, 2), g)  # [B, m * |G|, H, W]
