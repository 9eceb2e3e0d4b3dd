"""The coordinates: those of escnn as stored, orthonormal ones elsewhere; all bases equivariant and complete."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.cases import FROZEN
from support.kernels import irrep_energy
from support.reference_data import FOLDER, load_bases

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import KernelBasis, elements, load_kernel_basis
from equivision_timm.kernels import Kernel, harmonics

ESCNN = FOLDER.parent / "escnn"
PUBLISHED = [Kernel(*case) for case in FROZEN]
OTHERS = [
    Kernel(group, size, input_type, cutoff)
    for group in ("c3", "c6", "c16", "d6", "d16")
    for size, input_type, cutoff in (
        (1, "regular", None),
        (3, "regular", None if group != "d16" else 1),
        (3, "trivial", 3),
        (5, "regular", 3) if group in ("c3", "c6") else (3, "regular", 3),
        (7, "regular", 2) if group == "c3" else (7, "trivial", 2),
        (7, "trivial", 3),
    )
] + [Kernel("c4", 5), Kernel("c8", 3, cutoff=3), Kernel("c8", 7, "trivial", 3), Kernel("d4", 5, "trivial")]


def by_name(kernels):
    return pytest.mark.parametrize("kernel", kernels, ids=lambda kernel: kernel.name)


def key(kernel):
    return f"{kernel.group}/{kernel.size}x{kernel.size}/{kernel.input_type}"


def equivariance_error(kernel, kernels):
    """Largest violation of K(g x)[g a, g b] = K(x)[a, b], over the symmetries of the pixel grid."""
    group = Group.from_name(kernel.group)
    quotients, error = group.left_quotients(), 0.0
    for g in group.grid_elements:
        moved = group.transform_image(kernels, g)[:, quotients[g]]
        if kernel.input_type == "regular":
            moved = moved[:, :, quotients[g]]
        error = max(error, (moved - kernels).abs().max().item())
    return error


@by_name(PUBLISHED)
def test_coordinates_of_escnn(kernel):
    """The stored tables and kernels were fitted to float32 kernels of escnn: closer than 1.2e-7 cannot be expected."""
    tables, basis = load_file(ESCNN / "bases.safetensors"), load_kernel_basis(kernel)
    assert (basis.coefficients - tables[f"{key(kernel)}/coefficients"]).abs().max() < 1.2e-7
    assert (basis.he_std - tables[f"{key(kernel)}/he_std"]).abs().max() < 2e-8
    assert (basis.sample() - load_bases()[key(kernel)]).abs().max() < 5e-7
    stored = json.loads((ESCNN / "elements.json").read_text())["elements"][key(kernel)]
    found = [(e.harmonic.frequency, e.harmonic.ring.radius, e.in_irrep, e.out_irrep) for e in elements(kernel)]
    part = {"c": slice(1, 2), "d": slice(0, 1) if kernel.group == "d1" else slice(0, 2)}[kernel.group[0]]
    assert [[m, radius, str(a[part]), str(b[part])] for m, radius, a, b in found] == stored


@by_name([*PUBLISHED, *OTHERS])
def test_equivariant_and_complete(kernel):
    basis, group = load_kernel_basis(kernel), Group.from_name(kernel.group)
    kernels = basis.sample()
    functions = sum(len(harmonic.js) for harmonic in harmonics(kernel))
    count = functions * (group.order if kernel.input_type == "regular" else 1)
    assert len(kernels) == len(basis.he_std) == count
    flat = kernels.flatten(1)
    if kernel in OTHERS:
        assert (flat @ flat.T - torch.eye(count, dtype=torch.float64)).abs().max() < 1e-12
    else:
        assert torch.linalg.cond(basis.coefficients.flatten(1)) < 3.9
    assert equivariance_error(kernel, kernels) < 1e-12
    if len(group.grid_elements) > 1:  # the controls: two input channels swapped, or pixels moved
        swapped = kernels.clone()
        swapped[:, :, :2] = kernels[:, :, :2].flip(2)
        assert equivariance_error(kernel, swapped) > 0.01 or kernel.input_type == "trivial" or kernel.group == "d1"
        assert equivariance_error(kernel, kernels.roll(1, 4)) > 0.01 or kernel.size == 1


@by_name([*PUBLISHED, *OTHERS])
def test_an_element_maps_one_irrep_to_one(kernel):
    # If an output irrep is reached at all, its channels get the variance 1 each, from all input irreps alike
    basis = load_kernel_basis(kernel)
    energy, sizes = irrep_energy(kernel, basis.sample())
    torch.testing.assert_close(energy.amax((0, 1)), energy.sum((0, 1)))  # all of it in one place
    variance = energy @ basis.he_std.square()  # [out, in]
    reached = variance > 1e-9
    expected = torch.tensor(sizes).double()[:, None] * reached / reached.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(variance, expected)
    assert reached.any()


def test_wrong_coordinates_are_seen():
    kernel, basis = Kernel("d6", 3), load_kernel_basis(Kernel("d6", 3))
    mixed = (basis.coefficients[[0, 5]] + basis.coefficients[[1, 20]]) / math.sqrt(2)
    energy, _ = irrep_energy(kernel, KernelBasis(basis.group, mixed, basis.functions, basis.he_std[:2]).sample())
    assert energy.amax((0, 1)).max() < 0.9


def test_coordinates_follow_from_the_functions():
    """Equal functions, whatever the arguments, have equal coordinates."""
    escnn = load_kernel_basis(Kernel("c8", 3)).coefficients
    for same in (Kernel("c8", 3, cutoff=2), Kernel("c8", 5, low_pass=True), Kernel("c8", 5, cutoff=2, low_pass=True)):
        assert torch.equal(load_kernel_basis(same).coefficients, escnn)
    assert load_kernel_basis(Kernel("c8", 3, cutoff=3)).coefficients.shape != escnn.shape


@pytest.mark.parametrize("group", ["c8", "d4", "c6"])
def test_low_pass_convolves_the_kernels_and_does_not_change_coefficients(group):
    """Orthonormal bases after the low pass would draw the fine functions as strong as the coarse at initialisation."""
    narrow, wide = Kernel(group, 3), Kernel(group, 5, low_pass=True)
    kernels = load_kernel_basis(narrow).sample()
    binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    filtered = F.conv2d(kernels.flatten(0, 2)[:, None], torch.outer(binomial, binomial)[None, None], padding=2)
    torch.testing.assert_close(load_kernel_basis(wide).sample(), filtered[:, 0].view(*kernels.shape[:3], 5, 5))
    assert torch.equal(load_kernel_basis(wide).he_std, load_kernel_basis(narrow).he_std)


@pytest.mark.parametrize("name", ["1x1/regular", "3x3/regular", "7x7/trivial"])
def test_kernels_of_reresnet(name):
    # e2cnn 0.2.3, cutoff 3 r: the same space in other coordinates
    e2cnn = load_file(FOLDER / "reresnet" / "bases.safetensors")[f"c8/{name}"].double().flatten(1)
    kernels = load_kernel_basis(Kernel("c8", int(name[0]), name[4:], 3)).sample().flatten(1)
    assert kernels.shape == e2cnn.shape
    solution = torch.linalg.lstsq(kernels.T, e2cnn.T).solution
    assert torch.linalg.matrix_rank(e2cnn, rtol=1e-4) == len(e2cnn)
    assert (kernels.T @ solution - e2cnn.T).abs().max() < 1e-6
    if name[0] != "1":  # fewer frequencies miss some
        fewer = load_kernel_basis(Kernel("c8", int(name[0]), name[4:], 2)).sample().flatten(1)
        assert (fewer.T @ torch.linalg.lstsq(fewer.T, e2cnn.T).solution - e2cnn.T).abs().max() > 0.01


def test_cutoffs():
    for kernel in (Kernel("c8", 3, cutoff=4), Kernel("c4", 5, cutoff=9), Kernel("d8", 7, "trivial", 6)):
        with pytest.raises(ValueError, match="cutoff"):
            load_kernel_basis(kernel)
    # sin(4 phi) vanishes on 3 x 3 pixels and on those rotated by 45 degrees, but not by 22.5
    assert len(load_kernel_basis(Kernel("c16", 3, cutoff=4)).he_std) == 16 * 10
    for cutoff in (None, 1, 2, 3):
        load_kernel_basis(Kernel("c4", 11, "trivial", cutoff))
