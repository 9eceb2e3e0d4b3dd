"""The low pass in front of strides: binomial, exact at odd sizes, no state; it mends aliasing; timm's names."""

import io
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BlurPool2d

from equivision_timm.layers import Blur2d, get_aa_layer
from equivision_timm.testing import assert_equivariant

KINDS = {"group": "d8", "input_type": "regular", "output_type": "regular", "in_channels": 32}


@pytest.mark.parametrize("taps", [3, 5, 7])
def test_values_are_binomial(taps):
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    row = torch.tensor([math.comb(taps - 1, k) / 2 ** (taps - 1) for k in range(taps)])
    expected = F.pad(torch.outer(row, row), [4 - taps // 2] * 4)
    assert torch.equal(Blur2d(taps, stride=1)(point)[0, 0], expected)


@pytest.mark.parametrize("size", [1, 8, 9, 12])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shape_is_that_of_a_convolution(size, stride):
    x = torch.randn(2, 3, size, 9)
    assert Blur2d(5, stride)(x).shape == nn.Conv2d(3, 3, 5, stride, 2)(x).shape


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("taps", [3, 5])
def test_quarter_turns_are_exact_at_odd_sizes_alone(taps, padding):
    layer = Blur2d(taps, 2, padding)
    assert_equivariant(layer, 17, tolerance=1e-6, **KINDS)
    with pytest.raises(AssertionError, match="not d8-equivariant"):
        assert_equivariant(layer, 16, **KINDS)
    with pytest.raises(AssertionError, match="not d8-equivariant"):  # what 'avg' is refused for
        assert_equivariant(nn.AvgPool2d(2), 17, **KINDS)


def test_it_removes_what_a_stride_would_alias():
    """Stripes above the new Nyquist frequency: strided as they are, they come out as strong as they went in."""
    x = torch.cos(2 * math.pi * 0.4 * torch.arange(65)).expand(1, 1, 65, 65)
    inside = (..., slice(4, -4), slice(4, -4))
    assert x[..., ::2, ::2].std() > 0.6
    assert Blur2d(5)(x)[inside].std() < 0.02
    assert Blur2d(3)(x)[inside].std() < 0.1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_types_formats_and_gradients(memory_format, dtype):
    x = torch.randn(2, 6, 9, 9, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    y = Blur2d(5)(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    expected = Blur2d(5).double()(x.detach().double())
    assert torch.allclose(y.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert not Blur2d(5).state_dict()
    assert not list(Blur2d(5).parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_same_in_every_graph():
    layer, x = Blur2d(5), torch.randn(2, 4, 9, 9)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), expected)
    assert torch.allclose(torch.jit.trace(layer, x)(x), expected, atol=1e-6)
    size = {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: None, 1: None, **size},))
    bigger = torch.randn(2, 4, 13, 15)
    assert torch.allclose(exported.module()(bigger), layer(bigger), atol=1e-6)
    assert torch.allclose(torch.func.vmap(layer)(x[None])[0], expected, atol=1e-6)
    assert torch.allclose(torch.fx.symbolic_trace(nn.Sequential(layer))(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["blur", "blurpc", "BlurPool", "blur_pool"])
def test_timms_names_mean_timms_layers(name):
    x = torch.randn(2, 4, 9, 9)
    theirs = BlurPool2d(4, pad_mode="constant" if name == "blurpc" else "reflect")
    assert torch.allclose(get_aa_layer(name)(stride=2)(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("avg", "'avg' is not equivariant .the centre of 2 x 2 pixels.*use 'blur'"),
        ("avg_pool", "'avg_pool' is not equivariant"),
        ("gauss", "unknown aa_layer 'gauss': use 'blur'"),
        (nn.AvgPool2d, "unknown aa_layer"),
    ],
)
def test_names_that_cannot_be_had(name, message):
    with pytest.raises(ValueError, match=message):
        get_aa_layer(name)


@pytest.mark.parametrize("arguments", [{"taps": 4}, {"stride": 0}, {"padding": "circular"}])
def test_arguments_that_do_not_exist(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}=.* does not exist: use"):
        Blur2d(**arguments)


def test_timm_has_no_other_name():
    """A new one has to be mapped or refused."""
    from timm.layers.blur_pool import _normalize_aa_layer

    for name in ("avg", "avgpool", "blur", "blurpool", "blurpc"):
        assert _normalize_aa_layer(name)
    with pytest.raises(AssertionError):
        _normalize_aa_layer("blur5")
