"""Whole networks, level by level, for every element of the group that is exact on the pixel grid."""

import pytest
import timm
import torch
from support.cases import GROUPS
from support.reference_data import image
from support.results import relative

from equivision_timm.groups import Group
from equivision_timm.testing import assert_equivariant, equivariance_error

# Size of the images, largest relative error of the maps and of the logits; bfloat16 has 8 significant bits, float32 24
CASES = {torch.float32: (65, 1e-5, 1e-4), torch.bfloat16: (33, 0.1, 0.1)}


def trained_a_little(name, size=65, **kwargs):
    """A network whose norms have statistics and weights of their own."""
    model = timm.create_model(name, num_classes=10, **kwargs).train()
    with torch.no_grad():
        model(image((4, 3, size, size), seed=1))
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def errors(name, group=None, **kwargs):
    """Of the logits, by element, without the identity."""
    found = equivariance_error(trained_a_little(name, **kwargs), 65, group)
    return [error for g, error in found.items() if g]


@pytest.mark.parametrize(
    ("depth", "width", "dtype"),
    [("18_fast", 8, torch.float32), ("50_fast", 2, torch.float32), ("50_fast", 2, torch.bfloat16)],
)
@pytest.mark.parametrize("group", GROUPS)
def test_every_level_and_the_logits(group, depth, width, dtype):
    model, parsed = trained_a_little(f"{group}resnet{depth}", width=width).to(dtype), Group.from_name(group)
    size, map_tolerance, logit_tolerance = CASES[dtype]
    x = image((2, 3, size, size)).to(dtype)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last).float()
        assert relative(logits[0], logits[1]) > 0.01
        for g in parsed.grid_elements:
            last, moved = model.forward_intermediates(parsed.transform_image(x, g))
            for level, (found, plain) in enumerate(zip(moved, maps, strict=True)):
                expected = parsed.transform_fields(plain, g)
                assert relative(found.float(), expected.float()) < map_tolerance, (level, g)
                assert g == 0 or not torch.allclose(found, plain, rtol=0.1, atol=map_tolerance), (level, g)
            assert relative(model.forward_head(last).float(), logits) < logit_tolerance, g


def test_logits_at_the_size_of_imagenet():
    assert_equivariant(trained_a_little("d8resnet18_fast"), 225)


@pytest.mark.parametrize(
    ("name", "kwargs", "lacking"),
    [
        ("c1resnet18_fast", {"width": 8}, "c4"),
        ("c4resnet18_fast", {}, "d1"),
        ("d1resnet18_fast", {"width": 8}, "c4"),
        ("c4resnet18_fast", {"group_pool": ""}, "c4"),
    ],
)
def test_symmetries_that_the_group_lacks_change_the_logits(name, kwargs, lacking):
    assert min(errors(name, lacking, **kwargs)) > 1e-3


@pytest.mark.parametrize(
    "keywords",
    [
        {"global_pool": "catavgmax", "output_stride": 8},
        {"group_pool": "avg", "output_stride": 16},
        {"norm_layer": "groupnorm1", "act_layer": "silu"},
        {"norm_layer": "layernorm2d", "global_pool": "max"},
    ],
    ids=str,
)
def test_other_poolings_strides_and_norms_are_invariant(keywords):
    assert max(errors("test_d4resnet", **keywords)) < 1e-4


@pytest.mark.parametrize("name", ["c16resnet18", "c6resnet18_fast"])
def test_other_groups(name):
    model = trained_a_little(name, width=2)
    found, exact = equivariance_error(model, 65), Group.from_name(model.group).grid_elements
    assert max(found[g] for g in exact) < 1e-4
    assert min(error for g, error in found.items() if g not in exact) > 1e-4  # resampled
