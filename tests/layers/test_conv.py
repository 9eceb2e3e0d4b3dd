import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.cases import FROZEN, GROUPS

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.layers import ConvNormAct, SteerableConv2d
from equivision_timm.testing import assert_equivariant, equivariance_error


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
def test_equivariant_with_dilation(group):
    check(make(group, 3, "regular", dilation=2))


@pytest.mark.parametrize("group", GROUPS)
def test_equivariant_in_bfloat16(group):
    check(make(group, 3, "regular", dtype=torch.bfloat16), tolerance=2e-2)


def test_even_size_with_stride_is_not_equivariant():
    with pytest.raises(AssertionError, match="SteerableConv2d is not c4-equivariant at 16 x 16"):
        check(make("c4", 3, "regular", stride=2), size=16)


def test_eighth_turns_are_near_and_a_random_filter_is_not():
    layer = make("c8", 3, "regular")
    with torch.no_grad():
        layer.weight[:, :, 16:] = 0  # the low frequencies: what the grid can turn by 45 degrees
    arguments = {"group": "c8", "input_type": "regular", "output_type": "regular", "in_channels": 24}
    errors = equivariance_error(layer, 33, **arguments)
    assert max(errors[g] for g in (0, 2, 4, 6)) < 1e-5
    assert len(errors) == 8


@pytest.mark.parametrize("layer", ["plain", "shuffled"])
def test_broken_layers_are_rejected(layer):
    steerable = make("c4", 3, "regular")
    plain = nn.Conv2d(12, 8, 3, padding=1, bias=False)
    shuffled = nn.Sequential(steerable, nn.ChannelShuffle(2))  # element-major instead of field-major
    arguments = {"group": "c4", "input_type": "regular", "output_type": "regular", "in_channels": 12}
    with pytest.raises(AssertionError, match="is not c4-equivariant"):
        assert_equivariant({"plain": plain, "shuffled": shuffled}[layer], 17, **arguments)
    assert_equivariant(steerable, 17, **arguments)


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


def test_initialisation_keeps_the_variance():
    layer = make("d4", 3, "regular", in_fields=20, out_fields=20)
    x = torch.randn(8, 160, 33, 33)
    assert layer(x)[..., 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.1)


def test_only_the_coefficients_are_saved():
    layer = make("c8", 3, "regular")
    assert list(layer.state_dict()) == ["weight"]
    assert not list(layer.named_buffers())
    assert layer.weight.ndim == 4  # what channels-last models take


def test_restored_after_to_empty():
    layer, x = make("c4", 3, "regular"), torch.randn(1, 12, 7, 7)
    expected = layer(x)
    weight = layer.weight.detach().clone()
    layer.to("meta").to_empty(device="cpu")
    layer.reset_parameters()
    with torch.no_grad():
        layer.weight.copy_(weight)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_fused_convolution_and_norm(group, norm_layer):
    layer = ConvNormAct(3, 5, 3, group, stride=2, norm_layer=norm_layer, act_layer=None)
    x = torch.randn(4, 3 * layer.conv.order, 9, 9)
    layer.train()(x)
    layer.eval()
    if norm_layer is nn.BatchNorm2d:
        nn.init.normal_(layer.norm.per_field.weight)
        nn.init.normal_(layer.norm.per_field.bias)
    expected = layer(x)
    fused = layer.fuse()
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(fused.norm, nn.Identity) == (norm_layer is nn.BatchNorm2d)
    assert not any(isinstance(module, SteerableConv2d) for module in fused.modules())


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel_size 4"):
        make("c4", 4, "regular")


def test_group_order_is_the_number_of_channels():
    assert make("d8", 1, "regular")(torch.zeros(1, 48, 1, 1)).shape == (1, 2 * Group.from_name("d8").order, 1, 1)
