"""The compiled code: the build, the choice of the level, and what is refused."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import auto, build_native, native_call, native_library

REPOSITORY = Path(__file__).parents[2]
LEVELS = list(build_native.LEVELS)
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PyTorch uses other threads here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder from which the libraries are loaded in this test."""
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    """As in a new process."""
    for cached in (native_library.library, native_call._call, auto.decide):
        cached.cache_clear()


def fill(folder, *levels):
    """Copies of the installed libraries."""
    for level in levels:
        for path in Path(native_library.__file__).parent.glob(f"native-*-{level}.so"):
            shutil.copy(path, folder)


def error(dtype=torch.float32):
    """Of a layer's outputs and gradients against the definition, relative."""
    layer, x = SteerableConv2d(5, 9, 3, "c8", strategy="native", dtype=dtype), torch.randn(3, 40, 21, 19, dtype=dtype)
    weights, found = torch.randn(3, 72, 21, 19, dtype=dtype), []
    for layer.strategy in ("native", "expand"):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        found.append((y, *torch.autograd.grad((y * weights).sum(), (inputs, layer.weight))))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("level", "capability"), list(zip(LEVELS, CAPABILITIES, strict=False)))
def test_levels(folder, monkeypatch, level, capability):
    """Each computes the same; the processor's is taken, or the next lower one that is there."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    fill(folder, level)
    assert native_library.library(torch.float32)._name.endswith(f"{level}.so")
    assert error() < 1e-5
    assert error(torch.float64) < 1e-13
    fill(folder, *set(LEVELS) - {level})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    forget()
    assert native_library.describe().endswith(level)


def test_without_libraries(folder):
    with pytest.raises(ValueError, match="pip install"):
        SteerableConv2d(100, 100, 3, "c8", strategy="native")
    model = timm.create_model("test_c8resnet").eval()  # without a warning: nothing is wrong
    assert "native" not in model.conv_strategies(65).values()


@pytest.mark.parametrize("edit", [b"", b"\n"])
def test_an_edited_source_is_not_run_stale(folder, monkeypatch, edit):
    fill(folder, *LEVELS)
    source = folder / "native.c"
    source.write_bytes(build_native.SOURCE.read_bytes() + edit)
    monkeypatch.setattr(build_native, "SOURCE", source)
    assert ("another native.c" in str(native_library.why_not())) is bool(edit)


def test_c_and_python_agree_on_a_layer():
    struct = re.search(r"typedef struct \{([^}]*)\} Layer;", build_native.SOURCE.read_text())[1]
    fields = re.findall(r"(?:long|REAL|Sparse)\b([^;]*);", re.sub(r"/\*.*?\*/", "", struct))
    names = [name.strip(" *") for group in fields for name in group.split(",")]
    assert names == [name for name, _ in native_library.CLayer._fields_]


def test_a_wheel_is_compiled_by_the_named_compiler(folder):
    compiler = f"sh -c 'echo $0 >> {folder}/calls; exec cc \"$@\" -O0' -DOPTION"
    command = f"{sys.executable} -m pip wheel -q --no-deps --no-build-isolation -w {folder} {REPOSITORY}".split()
    subprocess.run(command, env={**os.environ, "CC": compiler}, check=True)
    assert (folder / "calls").read_text().split() == ["-DOPTION"] * 2 * len(LEVELS)
    wheel = next(folder.glob("*-py3-none-linux_*.whl"))
    zipfile.ZipFile(wheel).extractall(folder / "wheel")
    for path in (folder / "wheel").rglob("*.so"):
        shutil.move(path, folder)
    assert error() < 1e-5


@pytest.fixture
def hook():
    return build_native.get_build_hook()(str(REPOSITORY), {}, None, None, "", "wheel")


def test_a_compiler_that_fails_leaves_the_pure_package(hook, monkeypatch):
    warnings, data = [], {}
    monkeypatch.setattr(type(hook), "app", SimpleNamespace(display_warning=warnings.append))
    monkeypatch.setenv("CC", "/bin/false")
    hook.initialize("standard", data)
    assert "conv_strategy 'native' will be missing" in warnings[0]
    assert not data  # neither libraries nor the tag of a platform


def test_without_a_compiler_the_build_requires_ziglang(hook, folder, monkeypatch):
    monkeypatch.setenv("CC", "")
    assert hook.dependencies() == []
    monkeypatch.setenv("PATH", str(folder))
    with monkeypatch.context() as patched:
        patched.setattr(build_native, "find_spec", lambda name: None)
        assert [name.split(">")[0] for name in hook.dependencies()] == ["ziglang"]
    pytest.importorskip("ziglang", reason="a C compiler as a package")
    paths, problem = build_native.build(folder)
    assert not problem
    assert len(paths) == 2 * len(LEVELS)
    assert error() < 1e-5
