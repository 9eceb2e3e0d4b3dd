"""The compiled strategy: its threads, what it refuses, and what it adds to inference."""

import dataclasses
import resource
import threading
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, native, native_library
from equivision_timm.layers.strategies.block_diagonal import block_weights
from equivision_timm.layers.strategies.expand import dense_filter

NATIVE = STRATEGIES["native"]
pytestmark = pytest.mark.skipif(bool(native_library.why_not()), reason=str(native_library.why_not()))


def test_gradients_are_the_same_every_time():
    """Sums over pixels are shared among threads: always in the same way."""
    layer = SteerableConv2d(9, 9, 3, "c8", strategy="native")
    x, weights = torch.randn(7, 72, 30, 30), torch.randn(7, 72, 30, 30)
    first, *others = [torch.autograd.grad((layer(x) * weights).sum(), layer.weight)[0] for _ in range(8)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 14, 33])
def test_few_images_are_shared_among_threads(kernel_size, size):
    threads = torch.get_num_threads()
    layer, x = SteerableConv2d(2, 3, kernel_size, "d4", strategy="native"), torch.randn(1, 16, size, size)
    try:
        torch.set_num_threads(4)
        chunked, _ = native._layer(x, 3, 2, layer.kernel.name, 1, 1)
        assert chunked.images == 1
        chunks = -(-chunked.out_height // chunked.rows)
        assert chunks >= min(4, size * size)
        with torch.no_grad():
            y, layer.strategy = layer(x), "expand"
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def resident_memory():
    """MB, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_threads_that_end_leave_no_memory():
    layer, x = SteerableConv2d(40, 40, 3, "c8", strategy="native").eval(), torch.randn(1, 320, 28, 28)

    def work():
        with torch.no_grad():
            layer(x)

    def threads(number):
        for _ in range(number):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    threads(20)
    before = resident_memory()
    threads(60)
    assert resident_memory() - before < 60  # each of them works in several MB


def test_only_on_the_cpu():
    layer = SteerableConv2d(1, 1, 1, "c4", strategy="native", device="meta")
    described = layer.describe(torch.device("meta"), torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="'native' runs on the CPU, but a tensor is on meta"):
        STRATEGIES["native"].pack(layer.weight, None, described)


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (2, 12, 5, 5), (8, 5, 5)])
def test_another_number_of_channels_is_refused(shape):
    layer = SteerableConv2d(2, 1, 3, "c4", strategy="native")
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"2 fields takes \[B, 8, H, W\], but got"):
            layer(torch.zeros(shape))


def test_memory_is_checked_in_front_of_c():
    x, layer = torch.rand(1, 8, 5, 5), SteerableConv2d(1, 1, 3, "c8", strategy="native")
    name, described = layer.kernel.name, layer.describe(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        weights = block_weights(layer.weight, name)
        operator = torch.ops.equivision_timm.native_conv2d
        backward = torch.ops.equivision_timm.native_conv2d_backward
        expected = layer(x)
        assert torch.allclose(operator(x, weights, name, 1, 1), expected, atol=1e-5)
        for call, error in (
            (lambda: operator(x.double(), weights, name, 1, 1), "should be the same"),
            (lambda: operator(x, weights[:-1], name, 1, 1), r"are \[84, O, I\], but got"),
            (lambda: operator(x, weights, "c8-1-regular", 1, 1), "block weights of 'c8-1-regular'"),
            (lambda: operator(x, weights, "c8-7-regular", 1, 1), "block weights of 'c8-7-regular'"),
            (lambda: operator(x[:, :4], weights, name, 1, 1), r"takes \[B, 8, H, W\]"),
            (lambda: operator(x[:, :, :0], weights, name, 1, 1), "at least 1 x 1 pixels"),
            (lambda: operator(x, weights, name, 0, 1), "stride 0"),
            (lambda: backward(x[..., :4], x, weights, name, 1, 1, True, True), "expects 200 contiguous values"),
            (lambda: backward(x.double(), x, weights, name, 1, 1, True, True), "should be the same"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=error):
                call()
        packed = NATIVE.pack(layer.weight, torch.zeros(1), described)
        for short, which in (
            (dataclasses.replace(packed, weights=packed.weights[:-1]), "packed"),
            (dataclasses.replace(packed, bias=torch.zeros(7)), "bias"),
        ):
            with pytest.raises(ValueError, match=f"contiguous values of .* as {which}"):
                NATIVE.infer(x, short, described)
        freed = x.clone()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="its memory was freed"):
            NATIVE.infer(freed, packed, described)
        negative = torch.complex(x, x).conj().imag  # the negative view of x
        assert negative.is_neg()
        assert torch.allclose(layer(negative), -expected, atol=1e-5)


@pytest.mark.parametrize("size", [0, 2, 7])
def test_c_refuses_kernels_that_it_does_not_know(size):
    """Whatever stands before it."""
    x = torch.rand(1, 8, 5, 5)
    layer, shape = native._layer(x, 1, 1, "c8-3-regular", 1, 1)
    layer.kernel_size = size
    y = torch.zeros(shape)
    arguments = {"x": x, "packed": x, "bias": None, "shortcut": None, "relu": 0, "y": y}
    with pytest.raises(ValueError, match=f"does not know kernels of {size} x {size}"):
        native._run("forward", layer, arguments, {})
    with pytest.raises(ValueError, match="does not know kernels"):
        native._run("backward", layer, {"dy": y, "x": x, "packed": x, "dx": x, "sums": None, "dw": None}, {})
    assert not y.any()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_with_shortcut_and_relu(strategy, kernel_size, dtype):
    layer = SteerableConv2d(3, 5, kernel_size, "c8")
    code, described = STRATEGIES[strategy], layer.describe(torch.device("cpu"), dtype)
    x, shortcut, bias = torch.randn(3, 24, 17, 19), torch.randn(3, 40, 17, 19), torch.randn(5)
    with torch.no_grad():
        filters = dense_filter(layer.weight, layer.kernel.name)
        plain = torch.nn.functional.conv2d(x, filters, bias.repeat_interleave(8), padding=kernel_size // 2)
        packed = code.pack(layer.weight, bias, described)
        arguments = (x.to(dtype), packed, described)
        other = shortcut.to(dtype)
        found = {
            "alone": (code.infer(*arguments), plain),
            "relu": (code.infer(*arguments, relu=True), plain.relu()),
            "shortcut": (code.infer(*arguments, shortcut=other), plain + shortcut),
            "both": (code.infer(*arguments, shortcut=other, relu=True), (plain + shortcut).relu()),
        }
    assert torch.equal(other, shortcut.to(dtype))  # only read
    for y, expected in found.values():
        assert y.dtype == dtype
        assert (y.float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 8e-2) * expected.abs().max()


def test_not_a_number_stays():
    layer = SteerableConv2d(1, 1, 1, "c4", strategy="native")
    x = torch.zeros(1, 4, 3, 3)
    x[0, :, 1, 1] = float("nan")
    with torch.no_grad():
        y = layer.infer(x, relu=True)
    assert y.isnan().sum() == 4
    assert y[0, :, 1, 1].isnan().all()


# Whole blocks


def trained(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 65, 65))
    return model.eval()


def in_steps(model, x):
    """The output with a hook on every activation, which keeps the steps apart; and what the hooks saw."""
    seen = []
    acts = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.SiLU))]
    hooks = [act.register_forward_hook(lambda module, args, y: seen.append(y.shape)) for act in acts]
    with torch.no_grad():
        y = model(x)
    for hook in hooks:
        hook.remove()
    return y, len(seen), len(acts)


@pytest.mark.parametrize("name", ["test_d4resnet", "c8resnet50_fast"])
@pytest.mark.parametrize("strategy", ["expand", "block_diagonal", "native"])
def test_a_block_in_one_go_computes_the_same(name, strategy):
    model = trained(name, conv_strategy=strategy)
    x = torch.randn(2, 3, 65, 65)
    expected, seen, acts = in_steps(model, x)
    assert seen == acts  # the hooks saw every activation
    image = x.clone()
    with torch.no_grad():
        features, found = model.forward_intermediates(x)[1], model(x)
        again = model.forward_intermediates(x)[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, image)
    for a, b in zip(features, again, strict=True):  # no map is written into after it was returned
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_other_activations_stay():
    model = trained("test_c8resnet", act_layer="silu")
    x = torch.randn(2, 3, 65, 65)
    expected, seen, acts = in_steps(model, x)
    assert seen == acts > 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_go_in_one_go():
    model = trained("test_c8resnet")
    x = torch.randn(2, 3, 65, 65, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
