import pytest
import torch
from cases import FROZEN, GROUPS, KERNELS
from reference_data import load_bases

from equivision_timm.groups import Group
from equivision_timm.kernel_bases import basis, load_kernel_basis, manifest


def test_every_case_is_frozen_and_nothing_else():
    assert sorted(manifest()["elements"]) == sorted(f"{g}/{k}x{k}/{t}" for g, k, t in FROZEN)
    assert len(FROZEN) == len(GROUPS) * len(KERNELS)


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_tables_equal_the_reference(group, size, input_type):
    frozen, key = load_kernel_basis(group, size, input_type), f"{group}/{size}x{size}/{input_type}"
    kernels = load_bases()[key]
    assert frozen.sample().shape == kernels.shape
    assert (frozen.sample() - kernels).abs().max() <= 5e-7
    assert (frozen.he_std - load_bases()[f"{key}/he_std"]).abs().max() <= 5e-7
    assert len(manifest()["elements"][key]) == len(kernels)


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_kernels_commute_with_the_grid_symmetries(group, size, input_type):
    # K(g x)[g a, g b] = K(x)[a, b], which is what makes a convolution equivariant
    parsed, kernels = Group.from_name(group), load_kernel_basis(group, size, input_type).sample()
    quotients = parsed.left_quotients()
    for g in parsed.grid_elements:
        moved = parsed.transform_image(kernels, g)[:, quotients[g]]
        if input_type == "regular":
            moved = moved[:, :, quotients[g]]
        torch.testing.assert_close(moved, kernels)
        assert g == 0 or size == 1 or not torch.allclose(parsed.transform_image(kernels, g), kernels)


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_elements_are_independent(group, size, input_type):
    kernels = load_kernel_basis(group, size, input_type).sample().flatten(1)
    assert torch.linalg.matrix_rank(kernels) == len(kernels)


def test_unknown_basis():
    with pytest.raises(ValueError, match=r"no frozen kernel basis 'c6/3x3/regular': the package carries c1/1x1"):
        load_kernel_basis("c6", 3, "regular")


def test_damaged_tables_are_refused(tmp_path, monkeypatch):
    content = bytearray((basis.FOLDER / "tables.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "tables.safetensors").write_bytes(content)
    monkeypatch.setattr(basis, "FOLDER", tmp_path)
    manifest()  # the one of the package, read before
    with pytest.raises(RuntimeError, match=r"damaged: sha256 [0-9a-f]{64}.*reinstall equivision-timm"):
        basis._tables.__wrapped__()


def test_manifest_names_the_origin():
    assert manifest()["origin"]["escnn"] == "1.0.11"
    assert manifest()["made_by"] == "scripts/freeze_kernel_bases.py"
