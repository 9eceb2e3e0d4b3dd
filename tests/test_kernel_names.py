"""`Kernel`: its names, its rings, and what it refuses."""

import pytest

from equivision_timm.kernels import Kernel


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (Kernel("c8", 3), "c8-3-regular"),
        (Kernel("d16", 7, "trivial", 3), "d16-7-trivial-3"),
        (Kernel("c4", 5, low_pass=True), "c4-5-regular-low"),
        (Kernel("d1", 5, "regular", 2, True), "d1-5-regular-2-low"),
    ],
)
def test_name_and_back(kernel, name):
    assert kernel.name == name
    assert Kernel.from_name(name) == kernel


@pytest.mark.parametrize(
    ("kernel", "frequencies"),
    [
        (Kernel("c8", 1), [0]),
        (Kernel("c8", 3), [0, 2]),
        (Kernel("c8", 5), [0, 2, 2]),
        (Kernel("c8", 7, "trivial"), [0, 2, 3, 2]),
        (Kernel("c8", 9), [0, 2, 3, 6, 2]),  # escnn: 2 r, less 1 where r is even, and 2 at the rim
        (Kernel("c8", 7, cutoff=3), [0, 3, 6, 9]),
        (Kernel("c8", 7, cutoff=2), [0, 2, 4, 6]),
        (Kernel("c8", 5, low_pass=True), [0, 2]),
        (Kernel("c8", 3, low_pass=True), [0]),
    ],
)
def test_frequencies_of_the_rings(kernel, frequencies):
    assert [ring.max_frequency for ring in kernel.rings] == frequencies
    assert [ring.radius for ring in kernel.rings] == list(range(len(frequencies)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e4", 3), "unknown group 'e4'"),
        (("c4", 2), "kernel_size 2 does not exist: use an odd number from 1 on"),
        (("c4", 3.0), "kernel_size 3.0 does not exist"),
        (("c4", 1, "regular", None, True), "kernel_size 1 does not exist: use an odd number from 3 on"),
        (("c4", 3, "vector"), "unknown input_type 'vector': use 'regular' or 'trivial'"),
        (("c4", 3, "regular", 0), "cutoff 0 does not exist: use a positive integer, or None"),
        (("c4", 3, "regular", 2.5), r"cutoff 2\.5 does not exist"),
    ],
)
def test_what_does_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        Kernel(*arguments)


@pytest.mark.parametrize("name", ["", "c8", "c8-3", "c8-3-regular-", "c8-3-regular-low-2", "c8-x-regular"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="names are such as 'c8-3-regular'"):
        Kernel.from_name(name)
