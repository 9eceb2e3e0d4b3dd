"""The kernels of a steerable convolution, and the functions of the plane that they are sums of.

On each ring of a kernel, from the centre outwards, and for each of its angular frequencies m, there is

    psi(x) = exp(-(|x| - radius)^2 / (2 sigma^2)) cos(m phi),   and for m > 0 the same with sin in place of cos

where phi is the polar angle of the pixel x, x to the right and y up; at the centre, only m = 0 does not vanish. An
element g = r^t f^p of the group mixes cos and sin of the same ring and frequency,

    psi_j(g^-1 x) = sum_j' D(g)[j, j'] psi_j'(x)

    D(r^t) = [[cos, sin], [-sin, cos]](2 pi m t / N),   D(f) = (-1)^m diag(1, -1)

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019).
"""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group, circle

__all__ = ["Harmonic", "Kernel", "Ring", "harmonics", "mixing", "pixels"]


@dataclass(frozen=True)
class Ring:
    """A Gaussian in the distance from the centre, times harmonics of the frequencies 0 ... `max_frequency`."""

    radius: float  # mean, in pixels
    sigma: float  # standard deviation
    max_frequency: int


@dataclass(frozen=True)
class Kernel:
    """The kernels from fields of one type to regular fields of a group, on a square grid of pixels.

    Args:
        cutoff: the ring of radius r has angular frequencies up to cutoff * r. None is the default of escnn: up to 2 on
            the outermost ring, 2 r - 1 on other rings of even radius, 2 r on those of odd radius.
        low_pass: convolve the functions, on (k - 2) x (k - 2) pixels, with the binomial filter
            [1, 2, 1] x [1, 2, 1] / 16, which removes most of the frequencies that a square grid cannot rotate.
    """

    group: str  # for example 'c8'
    size: int  # k, pixels along a side; odd
    input_type: str = "regular"  # or 'trivial', an image
    cutoff: int | None = None
    low_pass: bool = False
    name: str = field(init=False, repr=False, compare=False)  # the arguments as a string: 'c8-5-trivial-3-low'
    order: int = field(init=False, repr=False, compare=False)  # |G|

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", Group.from_name(self.group).order)
        smallest = 3 if self.low_pass else 1
        if not isinstance(self.size, int) or self.size % 2 == 0 or self.size < smallest:
            raise ValueError(f"kernel_size {self.size!r} is not supported: use an odd number from {smallest} on")
        check_choice("input_type", self.input_type, ("regular", "trivial"))
        if self.cutoff is not None and (not isinstance(self.cutoff, int) or self.cutoff < 1):
            raise ValueError(f"cutoff {self.cutoff!r} is not supported: use a positive integer, or None")
        cutoff = "" if self.cutoff is None else f"-{self.cutoff}"
        name = f"{self.group}-{self.size}-{self.input_type}{cutoff}" + ("-low" if self.low_pass else "")
        object.__setattr__(self, "name", name)

    @classmethod
    def from_name(cls, name: str) -> "Kernel":
        """The kernels with this `name`.

        Example:
            >>> Kernel.from_name("c8-3-regular").size
            3
        """
        match = re.fullmatch(r"(\w+)-(\d+)-([a-z]+)(?:-(\d+))?(-low)?", name)
        if match is None:
            raise ValueError(f"unknown kernels {name!r}: use a name such as 'c8-3-regular'")
        group, size, input_type, cutoff, low_pass = match.groups()
        return cls(group, int(size), input_type, None if cutoff is None else int(cutoff), bool(low_pass))

    @property
    def rings(self) -> tuple[Ring, ...]:
        """The rings of the functions (before the low pass), from the centre outwards."""
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
    """The functions of one ring and angular frequency m: cos, and sin if m > 0."""

    ring: Ring
    frequency: int
    js: list[int]  # the indices of cos and sin


def harmonics(kernel: Kernel) -> list[Harmonic]:
    """Ring by ring from the centre outwards, frequency by frequency; the functions j = 0 ... J - 1 in this order."""
    found, j = [], 0
    for ring in kernel.rings:
        for m in range(ring.max_frequency + 1):
            found.append(Harmonic(ring, m, [j, j + 1] if m else [j]))
            j += len(found[-1].js)
    return found


def pixels(kernel: Kernel) -> torch.Tensor:
    """psi [J, k, k], float64. cos and sin come from the integers (x + iy)^m: zeros and symmetries are exact."""
    size = kernel.size - 2 if kernel.low_pass else kernel.size
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    z = torch.complex(offsets.expand(size, size), -offsets[:, None].expand(size, size))  # x + iy
    distance, rows = z.abs(), []
    for harmonic in harmonics(kernel):
        ring, m = harmonic.ring, harmonic.frequency
        power = torch.ones_like(z)
        for _ in range(m):
            power = power * z
        wave = power * torch.exp(-(((distance - ring.radius) / ring.sigma) ** 2) / 2) / distance.clamp(min=1) ** m
        rows += [wave.real, wave.imag][: len(harmonic.js)]
    psi = torch.stack(rows)
    if kernel.low_pass:
        binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
        psi = F.conv2d(psi[:, None], torch.outer(binomial, binomial)[None, None], padding=2)[:, 0]
    return psi


def mixing(kernel: Kernel) -> torch.Tensor:
    """D [|G|, J, J], psi_j(g^-1 x) = sum_j' D(g)[j, j'] psi_j'(x); float64."""
    group, d = Group.from_name(kernel.group), []
    for g in range(group.order):
        p, t = divmod(g, group.rotations)
        blocks = []
        for harmonic in harmonics(kernel):
            m, n = harmonic.frequency, len(harmonic.js)
            cos, sin = circle(group.rotations)[m * t % group.rotations]
            even, odd = (-1.0) ** (m * p), (-1.0) ** (m * p + p)  # the signs of cos and sin under f^p
            block = torch.tensor([[even * cos, even * sin], [-odd * sin, odd * cos]], dtype=torch.float64)
            blocks.append(block[:n, :n])
        d.append(torch.block_diag(*blocks))
    return torch.stack(d)
