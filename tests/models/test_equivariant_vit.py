"""ViTs for every element of the group: maps of every block, logits, sizes; and what must fail."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from support.reference_data import image

from equivision_timm.groups import Group
from equivision_timm.testing import assert_equivariant, equivariance_error

FULL = {"equivariant_depth": 4}
KINDS = {
    "d4": {},
    "d4_polynomial": {"invariants": "polynomial"},
    "d4_full": FULL,
    "d4_registers_avg": {"reg_tokens": 2, "global_pool": "avg"},
    "d4_full_avg": {**FULL, "global_pool": "avg"},
    "d4_no_class_token_max": {"class_token": False, "global_pool": "max"},
    "d4_silu": {"act_layer": "silu"},
    "d1": {"group": "d1", "invariants": "trivial", **FULL},
    "d1_power": {"group": "d1"},
    "c4": {"group": "c4", "num_heads": 3},
    "c4_full": {"group": "c4", **FULL},
    "d2": {"group": "d2"},
}


def make(name="test_d4vit", **keywords):
    """A network in which every parameter matters, none at its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, "dynamic_img_size": True, **keywords})
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 else parameter + 0.1 * noise)
    return model.eval()


def relative(found, expected):
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def transform(group, maps, info, g):
    """g of a map: fields are permuted, ordinary channels stay; the pixels of both move."""
    if info["group"] == "c1":
        return group.transform_image(maps, g)
    return group.transform_fields(maps, g)


def check(model, x, map_tolerance=1e-5, logit_tolerance=1e-5):
    group = Group.from_name(model.group)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
        assert relative(logits[0], logits[1]) > 0.01
        for g in group.grid_elements:
            moved, found = model.forward_intermediates(group.transform_image(x, g))
            for info, ours, plain in zip(model.feature_info, found, maps, strict=True):
                expected = transform(group, plain, info, g)
                assert relative(ours, expected) < map_tolerance, (info["module"], g)
                still = ours.shape == plain.shape and relative(ours, plain) < 1e-3
                assert g == 0 or not still, (info["module"], g)
            assert relative(model.forward_head(moved), logits) < logit_tolerance, g


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_and_the_logits(kind):
    check(make(**KINDS[kind]), image((2, 3, 64, 64)))


@pytest.mark.parametrize("size", [(80, 80), (48, 80), (96, 64), (112, 32)], ids=str)
@pytest.mark.parametrize("kind", ["d4", "d4_full", "d1"])
def test_odd_grids_and_rectangles(kind, size):
    check(make(**KINDS[kind]), image((2, 3, *size)))


@pytest.mark.parametrize("name", ["d4vit_tiny_patch16_224", "d1vit_tiny_patch16_224"])
def test_at_the_size_of_imagenet(name):
    check(make(name, dynamic_img_size=False), image((2, 3, 224, 224)))


def test_in_bfloat16():
    check(make().bfloat16(), image((2, 3, 64, 64)).bfloat16(), map_tolerance=0.1, logit_tolerance=0.1)


@pytest.mark.parametrize("kind", ["d4", "d4_polynomial", "d4_full"])
def test_in_float64(kind):
    errors = equivariance_error(make(**KINDS[kind]).double(), 64)
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("group", ["d1", "c4"])
def test_symmetries_that_the_group_lacks_change_the_logits(group):
    model = make(group=group, img_size=64)
    lacking = {"d1": "c4", "c4": "d1"}[group]
    errors = equivariance_error(model, 64, lacking)
    assert min(error for g, error in errors.items() if g) > 1e-3


def test_hybrids_are_not_invariant():
    model = make(invariants="")
    with pytest.raises(AssertionError, match="is not d4-equivariant"):
        assert_equivariant(model, 64)
    errors = equivariance_error(model, 64)
    assert min(error for g, error in errors.items() if g) > 1e-3


def test_hybrids_say_so():
    names = timm.list_models("*hybrid*", module="equivariant_vit")
    assert len(names) == 4
    for name in names:
        assert "NOT invariant" in timm.model_entrypoint(name).__doc__
        assert name.startswith("d4hybridvit_")


def test_first_half_of_a_hybrid_is_equivariant():
    model, group = make(invariants=""), Group.from_name("d4")
    x = image((2, 3, 64, 64))
    with torch.no_grad():
        maps = model.forward_intermediates(x, [1, 2], intermediates_only=True)
        moved = model.forward_intermediates(group.transform_image(x, 1), [1, 2], intermediates_only=True)
    assert relative(moved[0], group.transform_fields(maps[0], 1)) < 1e-5
    assert relative(moved[1], group.transform_image(maps[1], 1)) > 1e-2


class Shifted(nn.Module):
    """Adds to each channel a number of its own, which no group commutes with."""

    def forward(self, x):
        return x + torch.linspace(-1, 1, x.shape[-1])


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        ("blocks.0.norm2", Shifted()),
        ("blocks.1.mlp", None),
        ("hand_over.invariants", None),
        ("unfold", None),
    ],
    ids=["shift", "act", "invariants", "positions"],
)
def test_a_broken_layer_is_found(place, layer):
    """The control of the tests above."""
    model = make()
    if place == "blocks.1.mlp":  # its activation in the irreps basis, where the group does more than permute
        layer = copy.deepcopy(model.blocks[1].mlp)
        layer.to_regular = layer.to_irreps = nn.Identity()
    if place == "hand_over.invariants":
        layer = nn.Linear(48, 36)
    if place == "unfold":
        torch.manual_seed(1)
        values = torch.randn(8, 6, 4, 4)
        layer = nn.Identity()
        layer.forward = lambda tiles: values
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    with pytest.raises(AssertionError):
        check(model, image((2, 3, 64, 64)))


@pytest.mark.parametrize("size", [64, 96])
def test_blank_images_have_gradients(size):
    """All irreps but the trivial one are zero there: the lengths of E have no slope, and none is NaN."""
    model = make()
    x = torch.zeros(1, 3, size, size, requires_grad=True)
    with torch.no_grad():
        model.pos_embed.zero_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_features_that_do_not_depend_on_place_are_equal_for_all_orientations():
    model = make(num_classes=0)
    x, group = image((1, 3, 64, 64)), Group.from_name("d4")
    with torch.no_grad():
        tokens = [model(group.transform_image(x, g)) for g in range(8)]
    assert tokens[0].shape == (1, 48)
    assert max(relative(token, tokens[0]) for token in tokens) < 1e-5
