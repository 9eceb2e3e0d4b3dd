"""Which kernels a steerable convolution learns the coefficients of: all that its basis follows from."""

import re
from dataclasses import dataclass

from equivision_timm.groups import Group

__all__ = ["Kernel", "Ring"]


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
