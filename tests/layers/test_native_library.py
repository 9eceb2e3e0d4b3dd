"""The library of the compiled strategy: how it comes to be, and what is said where it cannot."""

import platform
import subprocess
import sys
import warnings

import pytest
import timm
import torch

from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.conv_strategies import native_library

pytestmark = pytest.mark.skipif(bool(native_library.why_not()), reason=str(native_library.why_not()))


@pytest.fixture
def new_machine(tmp_path, monkeypatch):
    """Nothing was compiled before; the folder where libraries will lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.library.cache_clear()
    native_library._available.cache_clear()
    yield tmp_path / "equivision_timm" / "native"
    native_library.library.cache_clear()
    native_library._available.cache_clear()


def test_compiled_once(new_machine, monkeypatch):
    compiled = []
    run = subprocess.run
    monkeypatch.setattr(
        native_library.subprocess, "run", lambda args, **kwargs: compiled.append(args) or run(args, **kwargs)
    )
    for _ in range(2):
        native_library.library.cache_clear()  # as in a new process
        native_library.library(torch.float32)
    assert sum("-o" in args for args in compiled) == 1
    native_library.library(torch.float64)
    monkeypatch.setattr(native_library, "_processor", lambda: "another processor")
    native_library.library.cache_clear()
    native_library.library(torch.float32)
    assert sum("-o" in args for args in compiled) == 3
    assert len(list(new_machine.iterdir())) == 3


def test_two_processes_compile_at_once(new_machine):
    code = "import torch; from equivision_timm.layers.conv_strategies import native_library; print(native_library.library(torch.float32))"
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


def test_another_kind_of_threads(new_machine, monkeypatch):
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda path: object())
    with pytest.raises(ValueError, match="PyTorch's threads here are not those of GNU OpenMP"):
        SteerableConv2d(1, 1, 1, "c8", strategy="native")
