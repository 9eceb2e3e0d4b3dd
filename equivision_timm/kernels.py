"""The kernels of a steerable convolution and the functions of the plane that they are made of, in closed form.

On each ring of a kernel, from the centre outwards, and for each of its angular frequencies m, there is

    psi(x) = exp(-(|x| - radius)^2 / (2 sigma^2)) cos(m phi),   and for m > 0 the same with sin in place of cos

with phi the polar angle of the pixel x, x to the right and y up; at the centre only m = 0 does not vanish. An element
g = r^t f^p of the group mixes cos and sin of the same ring and frequency,

    psi_j(g^-1 x) = sum_j' D(g)[j, j'] psi_j'(x)

    D(r^t) = [[cos, sin], [-sin, cos]](2 pi m t / N),   D(f) = (-1)^m diag(1, -1)

No number here depends on the machine: cos(m phi) and sin(m phi) are the real and imaginary parts of the integer
(x + iy)^m over a root, exponentials are rounded correctly, and sums have one order.

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019).
"""

import math
import re
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache

import torch

from equivision_timm.groups import Group, circle

__all__ = ["Family", "Harmonic", "Kernel", "Ring", "families", "harmonics", "mix", "mixing", "pixels"]


@dataclass(frozen=True)
class Ring:
    """Functions around the centre: a Gaussian across, of mean `radius` and width `sigma` (pixels), harmonics along.

    Attributes:
        radius: of the ring.
        sigma: its width.
        max_frequency: the functions have the angular frequencies 0 ... `max_frequency`.
    """

    radius: float
    sigma: float
    max_frequency: int


@dataclass(frozen=True)
class Kernel:
    """The kernels from fields of one type to regular fields of a group, on a square grid of pixels.

    Args:
        group: name of the group, for example 'c8'.
        size: k, pixels along a side; odd.
        input_type: 'regular', or 'trivial' for an image.
        cutoff: the functions of the plane on the ring of radius r have angular frequencies up to cutoff * r. None is
            the default of escnn: up to 2 on the outermost ring, 2 r - 1 on other rings of even, 2 r on those of odd
            radius.
        low_pass: whether these functions, on (k - 2) x (k - 2) pixels, are convolved with the binomial filter
            [1, 2, 1] x [1, 2, 1] / 16, so that they have little of the frequencies that a square grid cannot rotate.

    Raises:
        ValueError: no such group, size, input type or cut-off.
    """

    group: str
    size: int
    input_type: str = "regular"
    cutoff: int | None = None
    low_pass: bool = False

    def __post_init__(self) -> None:
        Group.from_name(self.group)
        smallest = 3 if self.low_pass else 1
        if not isinstance(self.size, int) or self.size % 2 == 0 or self.size < smallest:
            raise ValueError(f"kernel_size {self.size!r} does not exist: use an odd number from {smallest} on")
        if self.input_type not in ("regular", "trivial"):
            raise ValueError(f"unknown input_type {self.input_type!r}: use 'regular' or 'trivial'")
        if self.cutoff is not None and (not isinstance(self.cutoff, int) or self.cutoff < 1):
            raise ValueError(f"cutoff {self.cutoff!r} does not exist: use a positive integer, or None")

    @property
    def name(self) -> str:
        """What operators of PyTorch, which take no objects, are told: 'c8-3-regular', or 'c8-5-trivial-3-low'."""
        cutoff = "" if self.cutoff is None else f"-{self.cutoff}"
        return f"{self.group}-{self.size}-{self.input_type}{cutoff}" + ("-low" if self.low_pass else "")

    @classmethod
    def from_name(cls, name: str) -> "Kernel":
        """The kernels called `name`.

        Raises:
            ValueError: no kernels have this name.

        Example:
            >>> Kernel.from_name("c8-3-regular").size
            3
        """
        match = re.fullmatch(r"(\w+)-(\d+)-([a-z]+)(?:-(\d+))?(-low)?", name)
        if match is None:
            raise ValueError(f"unknown kernels {name!r}: names are such as 'c8-3-regular'")
        cutoff = None if match[4] is None else int(match[4])
        return cls(match[1], int(match[2]), match[3], cutoff, match[5] is not None)

    @property
    def rings(self) -> tuple[Ring, ...]:
        """The rings, from the centre outwards, on which the functions of the plane live (before the low pass)."""
        outermost = (self.size - 2 if self.low_pass else self.size) // 2
        rings = [Ring(0.0, 0.005, 0)]
        for radius in range(1, outermost + 1):
            if self.cutoff is not None:
                max_frequency = self.cutoff * radius
            else:
                max_frequency = 2 if radius == outermost else 2 * radius - (radius + 1) % 2
            rings.append(Ring(float(radius), 0.4 if radius == outermost else 0.6, max_frequency))
        return tuple(rings)


@dataclass(frozen=True)
class Harmonic:
    """cos, and for frequency > 0 sin, of one ring and angular frequency.

    Attributes:
        ring: of the kernel.
        frequency: m.
        cos: index j of the function with cos.
        sin: index j of the function with sin; None for m = 0.
    """

    ring: Ring
    frequency: int
    cos: int
    sin: int | None


def harmonics(kernel: Kernel) -> list[Harmonic]:
    """Ring by ring from the centre outwards, frequency by frequency; the functions j = 0 ... J - 1 in this order."""
    found, j = [], 0
    for ring in kernel.rings:
        for m in range(ring.max_frequency + 1):
            found.append(Harmonic(ring, m, j, j + 1 if m else None))
            j += 2 if m else 1
    return found


def pixels(kernel: Kernel) -> torch.Tensor:
    """psi [J, k, k], float64, on the CPU."""
    size = kernel.size - 2 if kernel.low_pass else kernel.size
    rows = []
    for harmonic in harmonics(kernel):
        parts = [0] if harmonic.sin is None else [0, 1]
        rows += [[_value(harmonic, part, x, y) for y, x in _grid(size)] for part in parts]
    psi = torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, size, size)  # [J, k * k] -> [J, k, k]
    return _binomial(psi) if kernel.low_pass else psi


def _grid(size: int) -> list[tuple[int, int]]:
    """(y, x) of the pixels, row by row."""
    radius = size // 2
    return [(-row, column) for row in range(-radius, radius + 1) for column in range(-radius, radius + 1)]


def _value(harmonic: Harmonic, part: int, x: int, y: int) -> float:
    """psi at the pixel (x, y); part 0 is cos, 1 is sin."""
    m, squared = harmonic.frequency, x * x + y * y
    if squared == 0 and m:
        return 0.0
    power = (1, 0)  # (x + i y)^m
    for _ in range(m):
        power = power[0] * x - power[1] * y, power[0] * y + power[1] * x
    return _profile(squared, harmonic.ring) * (power[part] / math.sqrt(squared**m))


@cache
def _profile(squared: int, ring: Ring) -> float:
    """exp(-(|x| - radius)^2 / (2 sigma^2)) where |x|^2 = `squared`."""
    with localcontext(Context(prec=40)):
        distance = Decimal(squared).sqrt() - Decimal(str(ring.radius))
        return float((-((distance / Decimal(str(ring.sigma))) ** 2) / 2).exp())


def _binomial(images: torch.Tensor) -> torch.Tensor:
    """`images` [J, k, k] convolved with [1, 2, 1] x [1, 2, 1] / 16: [J, k + 2, k + 2]."""
    for axis in (1, 2):
        wide = torch.nn.functional.pad(images, (0, 0, 2, 2) if axis == 1 else (2, 2))
        n = images.shape[axis] + 2
        images = (wide.narrow(axis, 0, n) + 2 * wide.narrow(axis, 1, n) + wide.narrow(axis, 2, n)) / 4
    return images


def mix(kernel: Kernel, functions: torch.Tensor) -> torch.Tensor:
    """D(g) applied to `functions` [J, ...] for every element g: [|G|, J, ...]."""
    group, all_harmonics = Group.from_name(kernel.group), harmonics(kernel)
    n, moved = group.rotations, []
    for g in range(group.order):
        p, t = divmod(g, n)
        rows = []
        for harmonic in all_harmonics:
            m = harmonic.frequency
            if harmonic.sin is None:
                rows.append(functions[harmonic.cos])
                continue
            a, b, (cos, sin) = functions[harmonic.cos], functions[harmonic.sin], circle(n)[m * t % n]
            sign = -1.0 if p and m % 2 else 1.0
            rows.append(sign * (cos * a + sin * b))
            rows.append((-sign if p else sign) * (cos * b - sin * a))
        moved.append(torch.stack(rows))
    return torch.stack(moved)


def mixing(kernel: Kernel) -> torch.Tensor:
    """D [|G|, J, J], psi_j(g^-1 x) = sum_j' D(g)[j, j'] psi_j'(x); float64, on the CPU."""
    count = sum(1 if harmonic.sin is None else 2 for harmonic in harmonics(kernel))
    return mix(kernel, torch.eye(count, dtype=torch.float64, device="cpu"))


@dataclass(frozen=True)
class Family:
    """Functions of several rings and frequencies that the group transforms alike; those of two families are orthogonal.

    Attributes:
        members: for each member its functions as pairs of j and a sign: sum_n' D(g)[n, n'] sign_n' psi_j(n') is what
            g makes of sign_n psi_j(n), with the same D for all members. One function, or cos and sin.
        fixed: whether no element changes them: D = 1.
    """

    members: tuple[tuple[tuple[int, float], ...], ...]
    fixed: bool


def families(kernel: Kernel) -> list[Family]:
    """The functions by how the group transforms them, which follows from their frequencies.

    A rotation by 360/N degrees makes 2 pi m / N of the angle m phi. Where this is a multiple of a half rotation, it
    multiplies cos and sin by the same sign and mixes nothing. Elsewhere cos and sin belong together, and since
    frequencies m and -m + N cannot be told apart, sin has the opposite sign in one of them. On the square grid of
    pixels, functions of even and of odd frequency are orthogonal, as are cos and sin.
    """
    group = Group.from_name(kernel.group)
    n = group.rotations
    found: dict[tuple, list] = {}
    for harmonic in harmonics(kernel):
        m, parity = harmonic.frequency % n, harmonic.frequency % 2
        if 2 * m % n:  # 0 < m < N / 2, or N / 2 < m < N
            key, sign = (min(m, n - m), parity, "both"), 1.0 if 2 * m < n else -1.0
            found.setdefault(key, []).append(((harmonic.cos, 1.0), (harmonic.sin, sign)))
            continue
        found.setdefault((m, parity, "cos"), []).append(((harmonic.cos, 1.0),))
        if harmonic.sin is not None:
            found.setdefault((m, parity, "sin"), []).append(((harmonic.sin, 1.0),))

    def fixed(m: int, parity: int, part: str) -> bool:
        return m == 0 and not (group.reflections and parity != (part == "sin"))

    return [Family(tuple(members), fixed(*key)) for key, members in found.items()]
