"""The compiled strategy: its threads, what it refuses, and what it adds to inference."""

import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from equivision_timm.layers import NativeConv2d, SteerableConv2d
from equivision_timm.layers.strategies import native_call, native_library
from equivision_timm.layers.strategies.basis import block_weights
from equivision_timm.layers.strategies.expand import dense_filter

pytestmark = pytest.mark.skipif(bool(native_library.why_not()), reason=str(native_library.why_not()))


def test_gradients_are_the_same_every_time():
    """Sums over pixels are shared among threads: always in the same way."""
    layer = SteerableConv2d(9, 9, 3, "c8", strategy="native")
    x, weights = torch.randn(7, 72, 30, 30), torch.randn(7, 72, 30, 30)
    first, *others = [torch.autograd.grad((layer(x) * weights).sum(), layer.weight)[0] for _ in range(8)]
    assert all(torch.equal(first, other) for other in others)


def test_threads_that_end_leave_no_memory():
    layer, x = SteerableConv2d(40, 40, 3, "c8", strategy="native").requires_grad_(False), torch.randn(1, 320, 28, 28)

    def run(number):
        for _ in range(number):
            thread = threading.Thread(target=layer, args=(x,))
            thread.start()
            thread.join()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20  # MB

    before = run(20)
    assert run(60) - before < 60  # each of them works in several MB


def test_memory_is_checked_before_c():
    x, layer = torch.rand(1, 8, 5, 5), SteerableConv2d(1, 1, 3, "c8", strategy="native")
    name, operators = layer.kernel.name, torch.ops.equivision_timm
    operator, backward, fused = operators.native_conv2d, operators.native_conv2d_backward, operators.native_fused_conv2d
    with torch.no_grad():
        weight, expected = layer.weight.detach(), layer(x)
        packed, blocks, bias = native_call.pack(weight, name), block_weights(weight, name), torch.zeros(1)
        assert torch.allclose(operator(x, weight, name, 1, 1), expected, atol=1e-5)
        assert torch.allclose(fused(x, packed, bias, None, False, name, 1, 1, 1), expected, atol=1e-5)
        freed, other_tile = x.clone(), packed.reshape(-1, 2)
        freed.untyped_storage().resize_(0)
        for call, error in (
            (lambda: layer(x[:, :7]), "fields"),
            (lambda: operator(x.double(), weight, name, 1, 1), "weight"),
            (lambda: operator(x, weight[:, :, :-1], name, 1, 1), "weight"),
            (lambda: operator(x, weight, "c8-1-regular", 1, 1), "weight"),
            (lambda: operator(x[:, :4], weight, name, 1, 1), "fields"),
            (lambda: operator(torch.cat([x, x], 1), weight, name, 1, 1), "weight"),
            (lambda: operator(x[:, :, :0], weight, name, 1, 1), "pixels"),
            (lambda: operator(x, weight, name, 0, 1), "stride"),
            (lambda: operator(freed, weight, name, 1, 1), "memory"),
            (lambda: backward(x[..., :4], x, blocks, name, 1, 1, True, True), "dy"),
            (lambda: backward(x.double(), x, blocks, name, 1, 1, True, True), "dy"),
            (lambda: backward(x, x, blocks[1:], name, 1, 1, True, True), "weights"),
            (lambda: fused(x, packed[:-1], bias, None, False, name, 1, 1, 1), "packed"),
            (lambda: fused(x, other_tile, bias, None, False, name, 1, 1, 1), "processor"),
            (lambda: fused(x, packed, torch.zeros(7), None, False, name, 1, 1, 1), "bias"),
            (lambda: fused(x, packed, bias, x[:, :7], False, name, 1, 1, 1), "expand"),
            (lambda: fused(x.to("meta"), packed, bias, None, False, name, 1, 1, 1).cpu(), "meta"),
        ):
            with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=error):
                call()
        negative = torch.complex(x, x).conj().imag  # the negative view of x
        assert negative.is_neg()
        assert torch.allclose(layer(negative), -expected, atol=1e-5)


@pytest.mark.parametrize(
    ("group", "kernel_size", "low_pass", "out_fields"),
    [("c8", 1, False, 5), ("d4", 3, False, 37), ("c3", 5, True, 20), ("d1", 5, False, 1), ("c16", 3, False, 9)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_convolution(group, kernel_size, low_pass, out_fields, dtype):
    """act(conv + bias + shortcut), and its gradients for x and the shortcut, against the definition in float64."""
    layer = SteerableConv2d(3, out_fields, kernel_size, group, stride=2, low_pass=low_pass)
    bias, x = torch.randn(out_fields), torch.randn(3, 3 * layer.order, 9, 11)
    shortcut, grad = torch.randn(2, 3, out_fields * layer.order, 5, 6)
    filters = dense_filter(layer.weight.detach().double(), layer.kernel.name)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for relu, added in ((False, None), (True, None), (False, shortcut), (True, shortcut)):
        fused = NativeConv2d(layer.describe(x.device, wide), layer.weight.to(wide), bias, relu)
        found_in = [None if t is None else t.to(dtype).requires_grad_() for t in (x, added)]
        exact_in = [None if t is None else t.detach().double().requires_grad_() for t in found_in]
        exact = F.conv2d(exact_in[0], filters, bias.double().repeat_interleave(layer.order), 2, kernel_size // 2)
        exact = exact if added is None else exact + exact_in[1]
        exact = exact.relu() if relu else exact
        found = fused(*found_in)
        wanted = [i for i, t in enumerate(found_in) if t is not None]
        gradients = torch.autograd.grad(found, [found_in[i] for i in wanted], grad.to(dtype))
        expected = torch.autograd.grad(exact, [exact_in[i] for i in wanted], grad.to(dtype).double())
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}[dtype]
        for a, b in zip((found, *gradients), (exact, *expected), strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() < tolerance * b.abs().max()
    nan = [None if t is None else torch.full_like(t, torch.nan) for t in found_in]
    assert fused(*nan).isnan().all()
    fused.packed.view(-1)[0] += 1  # the control
    assert (fused(*found_in).double() - exact).abs().max() > 0.1
