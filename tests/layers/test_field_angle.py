"""FieldAngle: the angle moves as the group moves directions in the image, whatever the weights; and it learns."""

import math

import pytest
import torch
import torch.nn as nn

from equivision_timm.groups import Group
from equivision_timm.layers import FieldAngle
from equivision_timm.models.equivariant_resnet import BasicBlock, EquivariantResNet

CASES = [(group, q) for group in ("c3", "c4", "c8", "d4", "d8") for q in (1, 2) if 2 * q < int(group[1:])]


def moved(angle, group, g):
    """The direction `angle` after r^k f^p: f makes pi - a of a, r^k adds 2 pi k / N."""
    p, k = divmod(g, group.rotations)
    return (math.pi - angle if p else angle) + 2 * math.pi * k / group.rotations


def error(a, b, q):
    """The largest difference of angles of period 2 pi / q."""
    return (1 - (q * (a - b)).cos()).abs().max().item()


@pytest.mark.parametrize(("name", "q"), CASES)
def test_angles_move_with_the_fields(name, q):
    """For every element, pixels and all; fields permuted by the inverse element are the control."""
    group = Group.from_name(name)
    layer = FieldAngle(3, name, q, angles=2).double()
    x = torch.randn(4, 3 * group.order, 5, 5, dtype=torch.float64)
    for g in range(1, group.order):
        fields = x.unflatten(1, (-1, group.order))
        y, wrong = (fields[:, :, group.left_quotients()[h]].flatten(1, 2) for h in (g, group.inverse(g)))
        assert layer(y).shape == (4, 2, 5, 5)
        assert error(layer(y), moved(layer(x), group, g), q) < 1e-14
        if group.inverse(g) != g and 2 * q * g % group.rotations:
            assert error(layer(wrong), moved(layer(x), group, g), q) > 0.1


@pytest.mark.parametrize("name", ["d4", "c8"])
def test_of_an_image(name):
    """Quarter turns and reflections of the image, float64; a linear layer in its place is the control."""
    group = Group.from_name(name)
    network = EquivariantResNet(BasicBlock, (1, 1, 1, 1), name, 2, num_classes=0, group_pool="").double().eval()
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    head, plain = FieldAngle(16, name).double(), nn.Linear(16 * group.order, 2).double()

    def phase(image):
        return torch.atan2(*plain(network(image)).flip(-1).T)

    for g in group.grid_elements[1:]:
        y = group.transform_image(x, g)
        assert error(head(network(y)), moved(head(network(x)), group, g), 1) < 1e-12
        assert error(phase(y), moved(phase(x), group, g), 1) > 1e-3


def test_loss_is_one_minus_the_cosine_and_has_gradients():
    layer = FieldAngle(2, "d8", 2).double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    wanted = torch.rand(3, 1, dtype=torch.float64) * 6
    torch.testing.assert_close(layer.loss(x, wanted), (1 - (2 * (layer(x) - wanted)).cos()).mean())
    assert layer.loss(x, layer(x).detach() + math.pi).item() == pytest.approx(0, abs=1e-12)  # an axis
    assert torch.autograd.gradcheck(lambda x, w: layer.loss(x, w), (x, wanted))


def test_half_precision_gives_angles_in_float32():
    layer, x = FieldAngle(2, "c8"), torch.randn(3, 16)
    angle = layer.bfloat16()(x.bfloat16())
    assert angle.dtype == torch.float32
    assert error(angle, layer.float()(x), 1) < 0.01


def test_frequencies_without_a_plane():
    for group, q in (("c4", 2), ("d2", 1), ("c8", 0), ("c8", 4)):
        with pytest.raises(ValueError, match="frequency"):
            FieldAngle(1, group, q)
