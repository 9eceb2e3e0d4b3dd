"""Sign groups of D4 and D8 bases: their number, the patterns of real machines, and the half turn."""

import pytest
import torch
from support.reference_data import sign_patterns

from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.weights.signs import (
    element_signs,
    half_turn,
    known_patterns,
    neighbours,
    parse_signs,
    sign_groups,
)


def kernels(group):
    """{key in the table of the reference: kernel}."""
    sizes = {"1x1/regular": (1,), "3x3/regular": (3,), "7x7/trivial": (7, "trivial")}
    return {f"{group}/{key}": Kernel(group, *size) for key, size in sizes.items()}


@pytest.mark.parametrize(("group", "count"), [("d4", 24), ("d8", 32), ("c1", 0), ("d1", 0), ("c4", 0), ("c8", 0)])
def test_number_of_groups(group, count):
    """One for each (J, input irrep, output irrep); in D4 one J of frequency 2 gives two."""
    assert len(sign_groups(group)) == count
    assert len({(g.frequency, g.in_irrep, g.out_irrep) for g in sign_groups(group)}) == count - (group == "d4")
    assert bool(known_patterns(group)) == bool(count)


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_known_patterns_are_those_that_were_measured(group):
    """The reference lists the elements of escnn's bases that are negated, kernel by kernel."""
    negated = [
        {key: (element_signs(kernel, pattern) < 0).nonzero()[:, 0].tolist() for key, kernel in kernels(group).items()}
        for pattern in known_patterns(group).values()
    ]
    measured = [{key: found.get(key, []) for key in kernels(group)} for found in sign_patterns()]
    assert all(found in measured for found in negated)
    assert all(found in negated for found in measured)
    assert len(negated) == {"d4": 4, "d8": 5}[group]  # two of the five agree in D4


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_half_turn_rotates_every_kernel(group):
    for kernel in kernels(group).values():
        values, signs = load_kernel_basis(kernel).sample(), element_signs(kernel, half_turn(group))
        torch.testing.assert_close(values.rot90(2, dims=(-2, -1)), values * signs.view(-1, 1, 1, 1, 1))
    assert "-" in half_turn(group)
    assert (half_turn(group) in neighbours(group)) == (group == "d4")  # one odd irrep; in D8 two


def test_parse_signs():
    assert parse_signs("d4", "scipy1.11-avx2") == "+" * 24
    assert parse_signs("d4", "-" * 24) == "-" * 24
    for group, wrong in (("d4", "+" * 23), ("d4", "x" * 24), ("d4", "scipy"), ("d4", ""), ("c8", "+")):
        with pytest.raises(ValueError, match="signs"):
            parse_signs(group, wrong)
