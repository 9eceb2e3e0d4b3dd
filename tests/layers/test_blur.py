"""The low pass before strides: binomial, exact at odd sizes, with `even` at all; timm's names mean timm's layers."""

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
    for size, stride in ((1, 2), (8, 2), (9, 2), (12, 3)):  # the shape is that of a convolution
        x = torch.randn(2, 3, size, 9)
        assert Blur2d(taps, stride)(x).shape == nn.Conv2d(3, 3, taps, stride, taps // 2)(x).shape


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("taps", [3, 5])
def test_quarter_turns_are_exact_at_odd_sizes_only(taps, padding):
    layer = Blur2d(taps, 2, padding)
    assert_equivariant(layer, 17, tolerance=1e-6, **KINDS)
    for wrong, size in ((layer, 16), (nn.AvgPool2d(2), 17)):  # the latter is why 'avg' is refused
        with pytest.raises(AssertionError, match="d8"):
            assert_equivariant(wrong, size, **KINDS)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_even_lengths_take_one_tap_more(taps, stride, padding):
    layer, odd = Blur2d(taps, stride, padding, (True, True)), Blur2d(taps, stride, padding)
    for size in (16, 17):
        assert_equivariant(layer, size, tolerance=1e-6, **KINDS)
    with pytest.raises(AssertionError, match="d8"):
        assert_equivariant(nn.Sequential(Blur2d(taps, stride, padding, (True, False)), nn.MaxPool2d(1, 2)), 16, **KINDS)
    x = torch.randn(2, 9, 13, 12)
    assert torch.equal(layer(x[..., :11]), odd(x[..., :11]))
    assert layer(x).shape[2:] == ((13, 11) if stride == 1 else (7, 6))
    if stride == 1:
        point, border = torch.zeros(1, 1, 20, 20), taps // 2
        point[0, 0, 10, 10] = 1
        row = torch.tensor([math.comb(taps, k) / 2**taps for k in range(taps + 1)])
        inside = slice(9 - border, 11 + border)
        assert torch.equal(layer(point)[0, 0, inside, inside], torch.outer(row, row))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_types_and_formats(memory_format, padding):
    layer, x = Blur2d(5, padding=padding), torch.randn(2, 6, 9, 9).bfloat16().to(memory_format=memory_format)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.allclose(y.double(), layer(x.double()), atol=2e-2)
    assert not layer.state_dict()


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "layer", [Blur2d(5), Blur2d(5, 2, "reflect", (True, True)), Blur2d(1, 1, even=(True, True))], ids=str
)
def test_same_in_every_graph(layer):
    """Even and odd lengths in one graph."""
    x = torch.randn(2, 4, 9, 10)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    size = {2: torch.export.Dim("height", min=3), 3: torch.export.Dim("width", min=3)}
    graphs = {
        "script": torch.jit.load(buffer),
        "trace": torch.jit.trace(layer, x),
        "export": torch.export.export(layer, (x,), dynamic_shapes=({0: None, 1: None, **size},)).module(),
        "vmap": lambda x: torch.func.vmap(layer)(x[None])[0],
        "fx": torch.fx.symbolic_trace(nn.Sequential(layer)),
    }
    for shape in ((9, 9), (13, 14), (14, 13), (8, 12)):
        x = torch.randn(2, 4, *shape)
        for name, graph in graphs.items():
            torch.testing.assert_close(graph(x), layer(x), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["blur", "blurpc", "BlurPool", "blur_pool"])
def test_timms_names_mean_timms_layers(name):
    x = torch.randn(2, 4, 9, 9)
    expected = BlurPool2d(4, pad_mode="constant" if name == "blurpc" else "reflect")(x)
    assert torch.allclose(get_aa_layer(name)(stride=2)(x), expected, atol=1e-6)


def test_what_is_refused():
    for name in ("avg_pool", "gauss", nn.AvgPool2d):
        with pytest.raises(ValueError, match="aa_layer"):
            get_aa_layer(name)
    for arguments in ({"taps": 4}, {"padding": "circular"}):
        with pytest.raises(ValueError, match=str(*arguments)):
            Blur2d(**arguments)
