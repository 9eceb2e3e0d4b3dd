import pytest
import torch
import torch.nn as nn
from support.cases import GROUPS

from equivision_timm.groups import Group
from equivision_timm.layers import FieldNorm, GroupPool
from equivision_timm.testing import assert_equivariant

REGULAR = {"input_type": "regular", "output_type": "regular", "tolerance": 1e-5}


def random_norm(fields, order, norm_layer=nn.BatchNorm2d):
    norm = FieldNorm(fields, order, norm_layer)
    for name, value in norm.per_field.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(norm.per_field.state_dict()[name], 0.5, 1.5)
    return norm


@pytest.mark.parametrize("group", GROUPS)
def test_norm_is_equivariant(group):
    order = Group.from_name(group).order
    assert_equivariant(random_norm(3, order), 9, group=group, in_channels=3 * order, **REGULAR)


def test_norm_not_shared_over_the_group_is_rejected():
    norm = random_norm(12, 1).per_field  # one mean and variance for each channel
    with pytest.raises(AssertionError, match="not c4-equivariant"):
        assert_equivariant(norm, 9, group="c4", in_channels=12, **REGULAR)


def test_norm_statistics_are_those_of_the_field():
    norm, x = FieldNorm(2, 4), torch.randn(5, 8, 6, 7) * 3 + 1
    y = norm.train()(x)
    for field in range(2):
        values, normed = x[:, 4 * field : 4 * field + 4], y[:, 4 * field : 4 * field + 4]
        expected = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
        assert norm.per_field.running_mean[field] == pytest.approx(0.1 * values.mean().item(), rel=1e-4)
        assert norm.per_field.running_var[field] == pytest.approx(0.9 + 0.1 * values.var().item(), rel=1e-4)


def test_tools_find_the_batch_norm():
    assert isinstance(FieldNorm(2, 4).per_field, nn.BatchNorm2d)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pool_type", ["max", "avg"])
def test_pool_is_invariant(group, pool_type):
    order = Group.from_name(group).order
    kinds = {"input_type": "regular", "output_type": "trivial"}
    assert_equivariant(GroupPool(order, pool_type), 9, group=group, in_channels=3 * order, **kinds, tolerance=1e-6)


def test_pool_values_and_ranks():
    x = torch.tensor([[1.0, 5.0, 2.0, -1.0]])
    assert GroupPool(2)(x).tolist() == [[5, 2]]
    assert GroupPool(2, "avg")(x).tolist() == [[3, 0.5]]
    assert GroupPool(2, "")(x) is x
    assert GroupPool(2)(x[..., None, None]).shape == (1, 2, 1, 1)


def test_pool_over_the_wrong_channels_is_rejected():
    wrong = nn.Sequential(nn.ChannelShuffle(4), GroupPool(4))
    with pytest.raises(AssertionError, match="is not c4-equivariant"):
        assert_equivariant(wrong, 9, group="c4", in_channels=12, input_type="regular", output_type="trivial")


def test_unknown_pool():
    with pytest.raises(ValueError, match="maximum"):
        GroupPool(4, "maximum")
