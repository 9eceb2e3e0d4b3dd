import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import GROUPS
from support.reference_data import load_bases

from equivision_timm.groups import Group, circle

groups = st.builds(Group, rotations=st.integers(1, 24), reflections=st.booleans())


@st.composite
def group_with_elements(draw, elements):
    group = draw(groups)
    return group, *(draw(st.integers(0, group.order - 1)) for _ in range(elements))


@given(group_with_elements(3))
def test_axioms_of_a_group(case):
    group, a, b, c = case
    assert group.product(group.product(a, b), c) == group.product(a, group.product(b, c))
    assert group.product(0, a) == group.product(a, 0) == a
    assert group.product(a, group.inverse(a)) == group.product(group.inverse(a), a) == 0
    assert [group.product(a, h) for h in group.left_quotients()[a].tolist()] == list(range(group.order))


@pytest.mark.parametrize("name", GROUPS)
def test_product_is_the_stored_representation(name):
    group, matrices = Group.from_name(name), load_bases()[f"{name}/regular_representation"].round()
    assert len(matrices) == group.order
    for a in range(group.order):
        for b in range(group.order):
            assert matrices[a][group.product(a, b), b] == 1  # rho(a) e_b = e_ab
        assert matrices[a].sum() == group.order
        assert torch.equal(matrices[group.inverse(a)], matrices[a].T)


@pytest.mark.parametrize("name", GROUPS)
def test_actions_on_images_and_fields_follow_the_product(name):
    group = Group.from_name(name)
    for act, x in (
        (group.transform_image, torch.randn(2, 3, 5, 5)),
        (group.transform_fields, torch.randn(2, 3 * group.order, 5, 5)),
    ):
        moved = {g: act(x, g) for g in group.grid_elements}
        for a in group.grid_elements:
            for b in group.grid_elements:
                assert torch.equal(act(moved[b], a), moved[group.product(a, b)])
            assert torch.equal(moved[a], x) == (a == 0)


def test_quarter_turn_is_counter_clockwise_and_the_mirror_swaps_left_and_right():
    image = torch.tensor([[1, 2], [3, 4]])
    d4 = Group.from_name("d4")
    assert d4.transform_image(image, 1).tolist() == [[2, 4], [1, 3]]
    assert d4.transform_image(image, 4).tolist() == [[2, 1], [4, 3]]


def test_what_is_refused():
    for name in ("e4", "c", "c0", "4", "", "C4", "d-1", "c4 ", 4, None):
        with pytest.raises(ValueError, match="group"):
            Group.from_name(name)
    with pytest.raises(ValueError, match="element 1"):
        Group.from_name("c8").transform_image(torch.zeros(1, 1, 3, 3), 1)


@given(st.integers(1, 200))
def test_points_of_the_circle(n):
    points = circle(n)
    assert len(points) == n
    for k, (cos, sin) in enumerate(points):
        assert abs(complex(cos, sin) - cmath.exp(2j * math.pi * k / n)) < 3e-15
        assert (cos, -sin) == points[-k % n]  # exact symmetry, which libraries of mathematics do not promise
        if n % 4 == 0:
            assert (-sin, cos) == points[(k + n // 4) % n]


@given(groups)
def test_fourier_matrix_makes_equivariant_maps_block_diagonal(group):
    fourier = group.fourier_matrix()
    torch.testing.assert_close(fourier @ fourier.T, torch.eye(group.order, dtype=torch.float64))
    kernel = torch.randn(group.order, dtype=torch.float64)
    found = fourier @ kernel[group.left_quotients()] @ fourier.T  # a map that commutes with the group
    blocks, row = [], 0
    for size, copies in group.irreps():
        blocks += [found[row : row + size, row : row + size]] * copies  # the copies are equal
        row += size * copies
    torch.testing.assert_close(found, torch.block_diag(*blocks))
