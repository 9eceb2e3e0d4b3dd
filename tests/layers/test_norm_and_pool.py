"""Batch norms of fields and pooling over the group."""

import pytest
import torch
import torch.nn as nn
from support.cases import GROUPS

from equivision_timm.groups import Group
from equivision_timm.layers import FieldNorm, GroupPool
from equivision_timm.testing import assert_equivariant

REGULAR = {"input_type": "regular", "output_type": "regular", "tolerance": 1e-5}
POOLED = {"input_type": "regular", "output_type": "trivial", "tolerance": 1e-6}


def random_norm(fields, order):
    norm = FieldNorm(fields, order)
    for value in norm.per_field.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("group", GROUPS)
def test_equivariant(group):
    order = Group.from_name(group).order
    assert_equivariant(random_norm(3, order), 9, group=group, in_channels=3 * order, **REGULAR)
    for pool_type in ("max", "avg"):
        assert_equivariant(GroupPool(order, pool_type), 9, group=group, in_channels=3 * order, **POOLED)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (random_norm(12, 1).per_field, REGULAR),  # one mean and variance for each channel
        (nn.Sequential(nn.ChannelShuffle(4), GroupPool(4)), POOLED),
    ],
)
def test_wrong_channels_are_rejected(wrong, kind):
    with pytest.raises(AssertionError, match="c4"):
        assert_equivariant(wrong, 9, group="c4", in_channels=12, **kind)


def test_norm_statistics_are_those_of_the_field():
    norm, x = FieldNorm(2, 4), torch.randn(5, 8, 6, 7) * 3 + 1
    y = norm.train()(x)
    assert isinstance(norm.per_field, nn.BatchNorm2d)  # tools find it
    for field in range(2):
        values, normed = x[:, 4 * field : 4 * field + 4], y[:, 4 * field : 4 * field + 4]
        expected = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
        assert norm.per_field.running_mean[field] == pytest.approx(0.1 * values.mean().item(), rel=1e-4)
        assert norm.per_field.running_var[field] == pytest.approx(0.9 + 0.1 * values.var().item(), rel=1e-4)


def test_pool_values_and_ranks():
    x = torch.tensor([[1.0, 5.0, 2.0, -1.0]])
    assert GroupPool(2)(x).tolist() == [[5, 2]]
    assert GroupPool(2, "avg")(x).tolist() == [[3, 0.5]]
    assert GroupPool(2, "")(x) is x
    assert GroupPool(2)(x[..., None, None]).shape == (1, 2, 1, 1)
    with pytest.raises(ValueError, match="maximum"):
        GroupPool(4, "maximum")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_is_overwritten_without_copies(memory_format):
    """It is not a view, whose gradient would be copied; the control is a view of it."""
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    norm = random_norm(2, 4)
    y = norm(x).relu_()
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    assert [norm(image).stride() for image in (x, x[:1], x[:1].detach())] == [t.stride() for t in (x, x[:1], x[:1])]
    assert type(norm(x).permute(0, 1, 3, 2).relu_().grad_fn).__name__ != "ReluBackward0"
    expected = torch.autograd.grad(norm(x).relu().square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), expected)
