"""`Kernel`: names, rings, errors; and the functions of the plane, against their definition by torch's cos and exp."""

import math

import pytest
import torch

from equivision_timm.groups import Group
from equivision_timm.kernels import Kernel, harmonics, mixing, pixels

KERNELS = [
    Kernel(group, size, cutoff=cutoff, low_pass=low_pass)
    for group in ("c1", "c3", "c4", "c6", "c16", "d1", "d2", "d3", "d6", "d16")
    for size, cutoff, low_pass in ((1, None, False), (3, 3, False), (5, None, True), (7, 2, False))
]
by_name = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def test_name_and_back():
    for kernel, name in (
        (Kernel("c8", 3), "c8-3-regular"),
        (Kernel("d16", 7, "trivial", 3), "d16-7-trivial-3"),
        (Kernel("d1", 5, "regular", 2, True), "d1-5-regular-2-low"),
    ):
        assert kernel.name == name
        assert Kernel.from_name(name) == kernel
    for name in ("", "c8-3", "c8-3-regular-", "c8-3-regular-low-2", "c8-x-regular"):
        with pytest.raises(ValueError, match="c8-3-regular"):
            Kernel.from_name(name)


@pytest.mark.parametrize(
    ("kernel", "frequencies"),
    [
        (Kernel("c8", 1), [0]),
        (Kernel("c8", 5), [0, 2, 2]),
        (Kernel("c8", 9), [0, 2, 3, 6, 2]),  # escnn: 2 r, less 1 if r is even, and 2 at the rim
        (Kernel("c8", 7, cutoff=3), [0, 3, 6, 9]),
        (Kernel("c8", 5, low_pass=True), [0, 2]),
    ],
)
def test_frequencies_of_the_rings(kernel, frequencies):
    assert [ring.max_frequency for ring in kernel.rings] == frequencies
    assert [ring.radius for ring in kernel.rings] == list(range(len(frequencies)))


def test_invalid_arguments():
    for arguments, noun in (
        (("e4", 3), "e4"),
        (("c4", 2), "kernel_size"),
        (("c4", 3.0), "kernel_size"),
        (("c4", 1, "regular", None, True), "kernel_size"),
        (("c4", 3, "vector"), "input_type"),
        (("c4", 3, "regular", 0), "cutoff"),
        (("c4", 3, "regular", 2.5), "cutoff"),
    ):
        with pytest.raises(ValueError, match=noun):
            Kernel(*arguments)


def on_pixels(kernel, g):
    """psi_j(g^-1 x) [J, k, k] by definition."""
    size = kernel.size - 2 * kernel.low_pass
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(-offsets, offsets, indexing="ij")
    reflected, rotation = divmod(g, Group.from_name(kernel.group).rotations)
    angle = torch.atan2(y, x) - 2 * math.pi * rotation / Group.from_name(kernel.group).rotations  # of g^-1 x
    distance, angle = torch.hypot(x, y), math.pi - angle if reflected else angle
    rows = []
    for harmonic in harmonics(kernel):
        ring, m = harmonic.ring, harmonic.frequency
        profile = torch.exp(-((distance - ring.radius) ** 2) / (2 * ring.sigma**2)) * ((distance > 0) | (m == 0))
        rows += [profile * torch.cos(m * angle)] + ([profile * torch.sin(m * angle)] if m else [])
    moved = torch.stack(rows)
    if kernel.low_pass:
        binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
        moved = torch.nn.functional.conv2d(moved[:, None], torch.outer(binomial, binomial)[None, None], padding=2)[:, 0]
    return moved


@by_name
def test_functions_transformed_by_the_group(kernel):
    moved = torch.einsum("gij,jyx->giyx", mixing(kernel), pixels(kernel))
    for g in range(Group.from_name(kernel.group).order):
        assert (moved[g] - on_pixels(kernel, g)).abs().max() < 1e-12
    assert torch.equal(moved[0], pixels(kernel))
    if kernel == Kernel("c6", 3, cutoff=3):
        assert (moved[1] - on_pixels(kernel, 5)).abs().max() > 0.1  # the control: the inverse rotation
