"""The steerable convolution: equivariant, equal to its definition, with the usual variance."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.cases import FROZEN, GROUPS

from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.layers import SteerableConv2d
from equivision_timm.testing import assert_equivariant


def make(group, size, input_type, in_fields=3, out_fields=2, **kwargs):
    return SteerableConv2d(in_fields, out_fields, size, group, input_type, **kwargs)


def check(layer, size=17, **kwargs):
    order = layer.order if layer.input_type == "regular" else 1
    types = {"input_type": layer.input_type, "output_type": "regular", "in_channels": layer.in_fields * order}
    assert_equivariant(layer, size, group=layer.group, **{**types, "tolerance": 1e-5, **kwargs})


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
@pytest.mark.parametrize("stride", [1, 2])
def test_equivariant(group, size, input_type, stride):
    check(make(group, size, input_type, stride=stride))


@pytest.mark.parametrize("group", GROUPS)
def test_equivariant_with_dilation_and_in_bfloat16(group):
    check(make(group, 3, "regular", dilation=2))
    check(make(group, 3, "regular", dtype=torch.bfloat16), tolerance=2e-2)


def test_broken_layers_are_rejected():
    with pytest.raises(AssertionError, match="16 x 16"):  # an even size with a stride
        check(make("c4", 3, "regular", stride=2), size=16)
    plain = nn.Conv2d(12, 8, 3, padding=1, bias=False)
    shuffled = nn.Sequential(make("c4", 3, "regular"), nn.ChannelShuffle(2))  # element-major instead of field-major
    for layer in (plain, shuffled):
        with pytest.raises(AssertionError, match="c4"):
            assert_equivariant(layer, 17, group="c4", input_type="regular", output_type="regular", in_channels=12)


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_equals_the_definition(group, size, input_type):
    # K[o, g, i, h](x) = sum_b w[o, i, b] basis[b, g, h](x), in float64, term by term
    layer = make(group, size, input_type, stride=2, dtype=torch.float64)
    basis = load_kernel_basis(Kernel(group, size, input_type)).sample()
    inputs = basis.shape[2]
    filters = torch.zeros(2 * layer.order, 3 * inputs, size, size, dtype=torch.float64)
    for o in range(2):
        for i in range(3):
            kernel = sum(w * element for w, element in zip(layer.weight[o, i, :, 0], basis, strict=True))
            rows, columns = slice(o * layer.order, (o + 1) * layer.order), slice(i * inputs, (i + 1) * inputs)
            filters[rows, columns] = kernel.detach()
    x = torch.randn(2, 3 * inputs, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, filters, stride=2, padding=size // 2))


@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_initialisation(group, size, input_type):
    layer = make(group, size, input_type, in_fields=40, out_fields=60)
    expected = load_kernel_basis(Kernel(group, size, input_type)).he_std.float() / 40**0.5
    assert layer.weight.shape == (60, 40, len(expected), 1)
    torch.testing.assert_close(layer.weight.std((0, 1)).flatten(), expected, rtol=0.08, atol=0)
    assert layer.weight.mean((0, 1)).abs().max() < 0.1 * expected.max()
    assert list(layer.state_dict()) == ["weight"]
