"""The bases that published weights speak in: unchanged, equivariant, and the closed form in other coordinates."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from support.cases import FROZEN, GROUPS, KERNELS
from support.reference_data import load_bases

from equivision_timm import kernel_basis
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import are_bases, bases_sha256, closed_form, load_kernel_basis, manifest
from equivision_timm.kernels import Kernel

by_table = pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)


def test_every_case_has_a_table_and_nothing_else():
    assert sorted(manifest()["elements"]) == sorted(f"{g}/{k}x{k}/{t}" for g, k, t in FROZEN)
    assert sorted(manifest()["tables"]) == sorted(manifest()["elements"])
    assert len(FROZEN) == len(GROUPS) * len(KERNELS)


@by_table
def test_tables_equal_the_reference(group, size, input_type):
    frozen, key = load_kernel_basis(Kernel(group, size, input_type)), f"{group}/{size}x{size}/{input_type}"
    kernels = load_bases()[key]
    assert frozen.sample().shape == kernels.shape
    assert (frozen.sample() - kernels).abs().max() <= 5e-7
    assert (frozen.he_std - load_bases()[f"{key}/he_std"]).abs().max() <= 5e-7
    assert len(manifest()["elements"][key]) == len(kernels)


@by_table
def test_kernels_commute_with_the_grid_symmetries(group, size, input_type):
    # K(g x)[g a, g b] = K(x)[a, b], which is what makes a convolution equivariant
    parsed, kernels = Group.from_name(group), load_kernel_basis(Kernel(group, size, input_type)).sample()
    quotients = parsed.left_quotients()
    for g in parsed.grid_elements:
        moved = parsed.transform_image(kernels, g)[:, quotients[g]]
        if input_type == "regular":
            moved = moved[:, :, quotients[g]]
        torch.testing.assert_close(moved, kernels)
        assert g == 0 or size == 1 or not torch.allclose(parsed.transform_image(kernels, g), kernels)


@by_table
def test_a_table_is_a_change_of_coordinates(group, size, input_type):
    kernel = Kernel(group, size, input_type)
    basis, (coefficients, he_std) = load_kernel_basis(kernel), closed_form(kernel)
    table, closed = basis.coefficients.flatten(1), coefficients.flatten(1)
    assert table.shape == closed.shape == (len(table), len(table))
    change = table @ torch.linalg.inv(closed)  # the closed form is orthonormal: the table's kernels in terms of it
    assert torch.linalg.cond(change) < 3.9
    assert torch.linalg.cond(table) < 3.9
    assert (change @ closed - table).abs().max() < 1e-12
    # As much variance at initialisation, for each irrep of the output and the input together
    norms = basis.sample().flatten(1).square().sum(1)
    torch.testing.assert_close((basis.he_std**2 * norms).sum(), (he_std**2).sum(), rtol=1e-6, atol=0)


def test_the_table_serves_every_kernel_of_its_functions():
    table = load_kernel_basis(Kernel("c8", 3)).coefficients
    assert load_kernel_basis(Kernel("c8", 3, cutoff=2)).coefficients is table
    assert load_kernel_basis(Kernel("c8", 1, cutoff=3)).coefficients is load_kernel_basis(Kernel("c8", 1)).coefficients
    assert load_kernel_basis(Kernel("c8", 5, low_pass=True)).coefficients is table
    for other in (Kernel("c8", 3, cutoff=3), Kernel("c8", 7), Kernel("c6", 3)):
        assert kernel_basis.load_table(other) is None
        torch.testing.assert_close(load_kernel_basis(other).coefficients, closed_form(other)[0], rtol=0, atol=0)


@pytest.mark.parametrize("group", ["c8", "d4", "c6"])
def test_low_pass_convolves_the_kernels_and_leaves_coefficients_alone(group):
    """Bases made orthonormal again would draw the fine functions as strong as the coarse: no low pass at the start."""
    narrow, wide = Kernel(group, 3), Kernel(group, 5, low_pass=True)
    kernels = load_kernel_basis(narrow).sample()
    binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    filtered = F.conv2d(kernels.flatten(0, 2)[:, None], torch.outer(binomial, binomial)[None, None], padding=2)
    torch.testing.assert_close(load_kernel_basis(wide).sample(), filtered[:, 0].view(*kernels.shape[:3], 5, 5))
    assert torch.equal(load_kernel_basis(wide).he_std, load_kernel_basis(narrow).he_std)


@pytest.mark.parametrize("name", ["coefficients", "he_std"])
def test_damaged_tables_are_refused(monkeypatch, name):
    content = {key: value.clone() for key, value in kernel_basis._tables().items()}
    content[f"c8/3x3/regular/{name}"].view(-1)[-1] += 1e-9
    monkeypatch.setattr(kernel_basis, "_tables", lambda: content)
    with pytest.raises(RuntimeError, match=r"c8/3x3/regular is damaged: sha256 [0-9a-f]{64}, .*; reinstall"):
        kernel_basis.load_table(Kernel("c8", 3))
    assert kernel_basis.load_table(Kernel("c8", 1)) is not None  # the others are sound


def test_manifest_names_the_origin():
    assert manifest()["origin"]["escnn"] == "1.0.11"
    assert manifest()["made_by"] == "scripts/freeze_kernel_bases.py of version 0.1.0"
    assert manifest()["sha256"] == hashlib.sha256((kernel_basis.FOLDER / "tables.safetensors").read_bytes()).hexdigest()


def test_a_hash_for_the_bases_of_a_model():
    stem, conv = Kernel("c8", 7, "trivial"), Kernel("c8", 3)
    found = bases_sha256([stem, conv])
    assert found == bases_sha256([conv, stem, conv])  # whatever the order
    others = [[stem], [conv], [stem, Kernel("d8", 3)], [stem, conv, Kernel("c8", 1)], [stem, Kernel("c8", 3, cutoff=3)]]
    assert len({found, *map(bases_sha256, others)}) == 6
    assert are_bases(found, [stem, conv])
    assert not are_bases(found, [stem])


def test_the_hash_that_earlier_conversions_name():
    earlier = "32bac030c5d0058a8ff0ce9222adcf937a18b8c3f87f14b3c6361fb14d574af6"
    assert are_bases(earlier, [Kernel("c8", 7, "trivial"), Kernel("c8", 3)])
    assert not are_bases(earlier, [Kernel("c8", 7, "trivial"), Kernel("c8", 3, cutoff=3)])  # none of these has a table
    assert not are_bases("0" * 64, [Kernel("c8", 3)])
