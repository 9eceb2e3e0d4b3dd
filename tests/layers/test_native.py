"""The compiled strategy: how its library comes to be, what is said where it cannot, and what it adds to inference."""

import platform
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.conv_strategies import block_diagonal, expand, native
from equivision_timm.layers.conv_strategies.irreps import block_weights

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=str(native.why_not()))


@pytest.fixture
def new_machine(tmp_path, monkeypatch):
    """Nothing was compiled before; the folder where libraries will lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    native._available.cache_clear()
    yield tmp_path / "equivision_timm" / "native"
    native.library.cache_clear()
    native._available.cache_clear()


def test_compiled_once(new_machine, monkeypatch):
    compiled = []
    run = subprocess.run
    monkeypatch.setattr(native.subprocess, "run", lambda args, **kwargs: compiled.append(args) or run(args, **kwargs))
    for _ in range(2):
        native.library.cache_clear()  # as in a new process
        native.library(torch.float32)
    assert sum("-o" in args for args in compiled) == 1
    native.library(torch.float64)
    monkeypatch.setattr(native, "_processor", lambda: "another processor")
    native.library.cache_clear()
    native.library(torch.float32)
    assert sum("-o" in args for args in compiled) == 3
    assert len(list(new_machine.iterdir())) == 3


def test_two_processes_compile_at_once(new_machine):
    code = (
        "import torch; from equivision_timm.layers.conv_strategies import native; print(native.library(torch.float32))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for run in runs:
        _, error = run.communicate()
        assert run.returncode == 0, error
    (library,) = new_machine.iterdir()
    assert library.suffix == ".so"


def test_without_a_compiler(new_machine, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(ValueError, match="there is no C compiler 'no-such-compiler': install one"):
        SteerableConv2d(100, 100, 3, "c8", strategy="native")
    layer = SteerableConv2d(100, 100, 3, "c8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong with such a machine
        assert layer.strategy_for((8, 800, 14, 14), torch.device("cpu")) == "block_diagonal"
    model = timm.create_model("test_c8resnet", conv_strategy="expand")
    with pytest.raises(ValueError, match="no-such-compiler"):
        model.set_conv_strategy("native")
    assert "native" not in model.conv_strategies(65).values()


def test_a_compiler_that_fails(new_machine, monkeypatch, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no room on the device' >&2; echo half > \"$8\"; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    layer, shape = SteerableConv2d(100, 100, 3, "c8"), (8, 800, 14, 14)
    with pytest.warns(RuntimeWarning, match="slower convolutions are used: .*broken-cc.*\n.*no room on the device"):
        assert layer.strategy_for(shape, torch.device("cpu")) == "block_diagonal"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert layer.strategy_for(shape, torch.device("cpu")) == "block_diagonal"
    with pytest.raises(ValueError, match="no room on the device"):
        SteerableConv2d(1, 1, 1, "c8", strategy="native")
    assert not list(new_machine.iterdir())  # no half library


@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86-64 compilers")
@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_narrower_vectors(new_machine, monkeypatch, option, kernel_size):
    monkeypatch.setenv("CC", f"cc {option}")
    layer, x = SteerableConv2d(5, 9, kernel_size, "c8", strategy="native"), torch.randn(3, 40, 21, 19)
    weights, found = torch.randn(3, 72, 21, 19), {}
    for strategy in ("native", "expand"):
        layer.strategy, inputs = strategy, x.clone().requires_grad_()
        y = layer(inputs)
        found[strategy] = (y, *torch.autograd.grad((y * weights).sum(), (inputs, layer.weight)))
    for a, b in zip(*found.values(), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert len(list(new_machine.iterdir())) == 1


def test_nowhere_to_put_the_library(new_machine):
    new_machine.parent.write_text("a file where the folder should be")
    layer = SteerableConv2d(100, 100, 3, "c8")
    with pytest.warns(RuntimeWarning, match="slower convolutions are used: .*has no place for its library: "):
        assert layer.strategy_for((8, 800, 14, 14), torch.device("cpu")) == "block_diagonal"
    with pytest.raises(ValueError, match="a folder that can be written in the environment variable XDG_CACHE_HOME"):
        SteerableConv2d(1, 1, 1, "c8", strategy="native")


def test_to_build_a_model_compiles_nothing(new_machine):
    model = timm.create_model("test_c8resnet")
    assert not new_machine.exists()
    assert "native" in model.conv_strategies(65).values()
    assert len(list(new_machine.iterdir())) == 1


def test_compiled_while_torch_compile_looks(new_machine):
    layer, x = SteerableConv2d(2, 2, 3, "c8"), torch.randn(1, 16, 9, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(x)
        assert len(list(new_machine.iterdir())) == 1
        layer.strategy = "expand"
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


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
        chunked, _ = native._layer(x, 3, 2, "d4", kernel_size, 1, 1)
        assert chunked.images == 1
        chunks = -(-chunked.out_height // chunked.rows)
        assert chunks >= min(4, size * size)
        with torch.no_grad():
            y, layer.strategy = layer(x), "expand"
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_another_kind_of_threads(new_machine, monkeypatch):
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: object())
    with pytest.raises(ValueError, match="PyTorch's threads here are not those of GNU OpenMP"):
        SteerableConv2d(1, 1, 1, "c8", strategy="native")


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
    with torch.no_grad(), pytest.raises(ValueError, match="'native' runs on the CPU, but a tensor is on meta"):
        layer(torch.zeros(1, 4, 5, 5, device="meta"))


@pytest.mark.parametrize("shape", [(2, 7, 5, 5), (2, 12, 5, 5), (8, 5, 5)])
def test_another_number_of_channels_is_refused(shape):
    layer = SteerableConv2d(2, 1, 3, "c4", strategy="native")
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"2 fields takes \[B, 8, H, W\], but got"):
            layer(torch.zeros(shape))


@pytest.mark.parametrize("code", [expand, block_diagonal, native], ids=lambda code: code.__name__.rpartition(".")[2])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_with_shortcut_and_relu(code, kernel_size, dtype):
    layer = SteerableConv2d(3, 5, kernel_size, "c8")
    x, shortcut, bias = torch.randn(3, 24, 17, 19), torch.randn(3, 40, 17, 19), torch.randn(5)
    with torch.no_grad():
        filters = layer._filter(layer.weight)
        plain = torch.nn.functional.conv2d(x, filters, bias.repeat_interleave(8), padding=kernel_size // 2)
        weights = filters if code is expand else block_weights(layer.weight, layer.irreps_basis)
        packed = code.pack(weights.to(dtype), bias.to(dtype), "c8", kernel_size)
        arguments = (x.to(dtype), packed, "c8", kernel_size, 1, 1)
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
        y = layer.convolve(x, relu=True)
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
