"""The functions of the plane against their definition, evaluated with torch's own cos and exp at any point."""

import pytest
import torch

from equivision_timm.groups import Group
from equivision_timm.kernels import Kernel, families, harmonics, mix, mixing, pixels

KERNELS = [
    Kernel(group, size, cutoff=cutoff, low_pass=low_pass)
    for group in ("c1", "c3", "c4", "c6", "c16", "d1", "d2", "d3", "d6", "d16")
    for size, cutoff, low_pass in ((1, None, False), (3, 3, False), (5, None, True), (7, 2, False))
]
by_name = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def evaluate(kernel, distance, angle):
    """psi_j at the points of these polar coordinates: [J, ...]."""
    rows = []
    for harmonic in harmonics(kernel):
        ring, m = harmonic.ring, harmonic.frequency
        profile = torch.exp(-((distance - ring.radius) ** 2) / (2 * ring.sigma**2)) * ((distance > 0) | (m == 0))
        rows.append(profile * torch.cos(m * angle))
        if m:
            rows.append(profile * torch.sin(m * angle))
    return torch.stack(rows)


def polar(size):
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(-offsets, offsets, indexing="ij")
    return torch.hypot(x, y), torch.atan2(y, x)


def on_pixels(kernel, g):
    """psi_j(g^-1 x) [J, k, k] by definition."""
    distance, angle = polar(kernel.size - 2 * kernel.low_pass)
    moved = evaluate(kernel, distance, Group.from_name(kernel.group).inverse_angle(g, angle))
    if kernel.low_pass:
        binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
        moved = torch.nn.functional.conv2d(moved[:, None], torch.outer(binomial, binomial)[None, None], padding=2)[:, 0]
    return moved


@by_name
def test_pixels_moved_by_the_group(kernel):
    psi = pixels(kernel)
    moved = mix(kernel, psi)
    for g in range(Group.from_name(kernel.group).order):
        assert (moved[g] - on_pixels(kernel, g)).abs().max() < 1e-12
    assert torch.equal(moved[0], psi)


def test_low_pass_keeps_the_number_of_functions():
    narrow, wide = pixels(Kernel("c8", 3)), pixels(Kernel("c8", 5, low_pass=True))
    assert narrow.shape == (6, 3, 3)
    assert wide.shape == (6, 5, 5)
    torch.testing.assert_close(wide[0] * 16, torch.outer(*[torch.tensor([0.0, 1, 2, 1, 0]).double()] * 2))
    torch.testing.assert_close(wide.sum((1, 2)), narrow.sum((1, 2)))


@by_name
def test_mixing_is_a_representation(kernel):
    # psi(h^-1 g^-1 x) = D(h) psi(g^-1 x) = D(h) D(g) psi(x) is what g h makes of psi
    group, d = Group.from_name(kernel.group), mixing(kernel)
    for g in range(min(group.order, 4)):
        for h in range(group.order):
            torch.testing.assert_close(d[h] @ d[g], d[group.product(g, h)], rtol=0, atol=1e-14)


@by_name
def test_members_of_a_family_are_transformed_alike_and_families_are_orthogonal(kernel):
    group, d, found = Group.from_name(kernel.group), mixing(kernel), families(kernel)
    moved = mix(kernel, pixels(kernel)).flatten(2)
    gram = sum(functions @ functions.T for functions in moved) / group.order
    seen = []
    for family in found:
        own = []
        for member in family.members:
            js, signs = [j for j, _ in member], torch.tensor([sign for _, sign in member]).double()
            own.append(d[:, js][:, :, js] * signs[:, None] * signs)
            rest = [j for j in range(d.shape[1]) if j not in js]
            assert not d[:, js][:, :, rest].any()
            torch.testing.assert_close(own[-1], own[0], rtol=0, atol=1e-15)
        assert family.fixed == torch.equal(own[0], torch.eye(own[0].shape[1]).double().expand_as(own[0]))
        js = [j for member in family.members for j, _ in member]
        rest = [j for j in range(d.shape[1]) if j not in js]
        assert not rest or gram[js][:, rest].abs().max() < 1e-13
        seen += js
    assert sorted(seen) == list(range(d.shape[1]))


def test_the_wrong_rotation_is_seen():
    kernel = Kernel("c6", 3)
    moved = mix(kernel, pixels(kernel))
    assert (moved[1] - on_pixels(kernel, 5)).abs().max() > 0.1
