import pytest
import timm
import torch
import torch.nn as nn

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.layers import GroupPool
from equivision_timm.testing import assert_equivariant, equivariance_error


class Constant(nn.Module):
    group, in_chans = "c4", 3

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((len(x), 5), self.value)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_output_that_says_nothing_is_refused(value):
    with pytest.raises(ValueError, match="the output of Constant is zero, not finite or does not depend on the image"):
        equivariance_error(Constant(value))


@pytest.mark.parametrize("argument", ["input_type", "output_type"])
def test_unknown_type(argument):
    with pytest.raises(ValueError, match=f"unknown {argument} 'vector': use one of"):
        equivariance_error(Constant(1.0), **{argument: "vector"})


def test_plain_network_is_rejected_and_the_mode_restored():
    model = timm.create_model("resnet18", num_classes=10).train()
    with pytest.raises(AssertionError, match=r"ResNet is not c4-equivariant at 65 x 65 pixels: .*\{1: .*, 2: .*, 3:"):
        assert_equivariant(model, 65, group="c4", in_channels=3)
    assert model.training
    assert_equivariant(model, 65, group="c1", in_channels=3)


def test_symmetry_that_the_group_lacks():
    model = timm.create_model("c4resnet18_fast", num_classes=10)
    assert_equivariant(model, 65)
    errors = equivariance_error(model, 65, group="d4")
    assert max(errors[g] for g in range(4)) < 1e-4
    assert min(errors[g] for g in range(4, 8)) > 1e-3


def test_even_sizes_are_not_exact():
    with pytest.raises(AssertionError, match="not d4-equivariant at 64 x 64 pixels"):
        assert_equivariant(timm.create_model("d4resnet18_fast", num_classes=10), 64)


def test_permutation_of_the_channels_counts():
    pool = GroupPool(4)
    kinds = {"group": "c4", "in_channels": 8, "size": 9, "input_type": "regular", "output_type": "trivial"}
    assert_equivariant(pool, **kinds)
    with pytest.raises(AssertionError, match="Sequential is not c4-equivariant"):
        assert_equivariant(nn.Sequential(nn.Conv2d(8, 8, 1), pool), **kinds)


def test_resampled_elements_of_smooth_fields_are_near():
    errors = equivariance_error(GroupPool(8), 65, "c8", "regular", "trivial", in_channels=16)
    assert errors[0] == 0
    assert max(errors.values()) < 0.3  # corners leave the image
