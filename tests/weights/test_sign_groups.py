"""The sign groups: their number, that the patterns of real machines are unions of them, and what the half turn does."""

import pytest
import torch
from support.reference_data import sign_patterns

from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.weights.equivision.sign_groups import (
    element_signs,
    half_turn,
    irrep_flips,
    known_patterns,
    parse_signs,
    sign_groups,
)

KEYS = ("1x1/regular", "3x3/regular", "7x7/trivial")


@pytest.mark.parametrize(("group", "triples", "groups"), [("d4", 23, 24), ("d8", 32, 32)])
def test_number_of_groups(group, triples, groups):
    """One group for each (J, input irrep, output irrep); in D4 one J of frequency 2 gives two."""
    found = sign_groups(group)
    assert len({(g.harmonic.split(" s")[0].split(" c")[0], g.in_irrep, g.out_irrep) for g in found}) == triples
    assert len(found) == groups
    elements = [element for g in found for element in g.elements]
    sizes = {key: load_kernel_basis(Kernel(group, int(key[0]), key.split("/")[1])).he_std.numel() for key in KEYS}
    assert sorted(elements) == sorted((f"{group}/{key}", i) for key, n in sizes.items() for i in range(n))


@pytest.mark.parametrize("group", ["c1", "d1", "c4", "c8"])
def test_no_groups_where_the_basis_is_the_same_everywhere(group):
    assert sign_groups(group) == ()
    assert known_patterns(group) == {}


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_measured_patterns_are_unions_of_groups(group):
    found = set()
    for negated in sign_patterns():
        signs = [{index in negated.get(key, []) for key, index in g.elements} for g in sign_groups(group)]
        assert all(len(values) == 1 for values in signs)
        pattern = "".join("-" if values.pop() else "+" for values in signs)
        found.add(pattern)
        for key, values in element_signs(group, pattern).items():
            assert (values < 0).nonzero().flatten().tolist() == negated.get(key, [])
    assert found == set(known_patterns(group).values())
    assert len(found) == {"d4": 4, "d8": 5}[group]  # two of the five agree in D4


def test_a_coarser_grouping_would_not_do():
    """Negative control: without the split of frequency 2, a measured pattern of D4 cuts through a group."""
    split = [g for g in sign_groups("d4") if (g.in_irrep, g.out_irrep) == ("(1, 1)", "(1, 1)") and g.frequency == 2]
    assert len(split) == 2
    negated = sign_patterns()[1]["d4/3x3/regular"]
    assert len({index in negated for g in split for _, index in g.elements}) == 2


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_half_turn_rotates_every_kernel(group):
    signs = element_signs(group, half_turn(group))
    for key in KEYS:
        kernels = load_kernel_basis(Kernel(group, int(key[0]), key.split("/")[1])).sample()
        turned = kernels.rot90(2, dims=(-2, -1))
        assert torch.allclose(turned, kernels * signs[f"{group}/{key}"].view(-1, 1, 1, 1, 1), atol=1e-6)
    assert half_turn(group) != "+" * len(half_turn(group))


def test_irrep_flips_contain_the_half_turn_of_d4():
    assert half_turn("d4") in irrep_flips("d4")  # one odd irrep, (1, 1)
    assert half_turn("d8") not in irrep_flips("d8")  # two, (1, 1) and (1, 3): their product
    both = [
        flip for flip in irrep_flips("d8") if sum(a == b == "-" for a, b in zip(flip, half_turn("d8"), strict=True))
    ]
    assert len(both) >= 2


def test_parse_signs():
    assert parse_signs("d4", "scipy1.11-avx2") == "+" * 24
    assert parse_signs("d4", "-" * 24) == "-" * 24
    for wrong in ("+" * 23, "x" * 24, "scipy", ""):
        with pytest.raises(ValueError, match="no sign pattern"):
            parse_signs("d4", wrong)
    with pytest.raises(ValueError, match="same on every machine"):
        parse_signs("c8", "+")
