"""Which kernels a steerable convolution learns the coefficients of: all that its basis follows from."""

import re
from dataclasses import dataclass

from equivision_timm.groups import Group

__all__ = ["Kernel"]


@dataclass(frozen=True)
class Kernel:
    """The kernels from fields of one type to regular fields of a group, on a square grid of pixels.

    Args:
        group: name of the group, for example 'c8'.
        size: k, pixels along a side; odd.
        input_type: 'regular', or 'trivial' for an image.
        cutoff: the functions of the plane at distance r from the centre have angular frequencies up to cutoff * r.
        low_pass: whether these functions, on (k - 2) x (k - 2) pixels, are convolved with the binomial filter
            [1, 2, 1] x [1, 2, 1] / 16, so that they have little of the frequencies that a square grid cannot rotate.

    Raises:
        ValueError: no such group, size, input type or cut-off.
    """

    group: str
    size: int
    input_type: str = "regular"
    cutoff: int = 2
    low_pass: bool = False

    def __post_init__(self) -> None:
        Group.from_name(self.group)
        smallest = 3 if self.low_pass else 1
        if not isinstance(self.size, int) or self.size % 2 == 0 or self.size < smallest:
            raise ValueError(f"kernel_size {self.size!r} does not exist: use an odd number from {smallest} on")
        if self.input_type not in ("regular", "trivial"):
            raise ValueError(f"unknown input_type {self.input_type!r}: use 'regular' or 'trivial'")
        if not isinstance(self.cutoff, int) or self.cutoff < 1:
            raise ValueError(f"cutoff {self.cutoff!r} does not exist: use a positive integer")

    @property
    def name(self) -> str:
        """What operators of PyTorch, which take no objects, are told: 'c8-3-regular-2', or 'c8-5-regular-2-low'."""
        return f"{self.group}-{self.size}-{self.input_type}-{self.cutoff}" + ("-low" if self.low_pass else "")

    @classmethod
    def from_name(cls, name: str) -> "Kernel":
        """The kernels called `name`.

        Raises:
            ValueError: no kernels have this name.

        Example:
            >>> Kernel.from_name("c8-3-regular-2").size
            3
        """
        match = re.fullmatch(r"(\w+)-(\d+)-(\w+)-(\d+)(-low)?", name)
        if match is None:
            raise ValueError(f"unknown kernels {name!r}: names are such as 'c8-3-regular-2'")
        return cls(match[1], int(match[2]), match[3], int(match[4]), bool(match[5]))
