"""The library of the compiled strategy: how it comes to be, and what is said where it cannot."""

import ctypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import native_library

pytestmark = pytest.mark.skipif(bool(native_library.why_not()), reason=str(native_library.why_not()))


@pytest.fixture
def new_machine(tmp_path, monkeypatch):
    """Nothing was compiled before; the folder where libraries will lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    in_a_new_process()
    yield tmp_path / "equivision_timm" / "native"
    in_a_new_process()


@pytest.fixture
def compiled(monkeypatch):
    """The commands that compile."""
    commands, popen = [], subprocess.Popen

    def run(command, **kwargs):
        commands.extend([command] if "-o" in command else [])
        return popen(command, **kwargs)

    monkeypatch.setattr(native_library.subprocess, "Popen", run)
    return commands


def in_a_new_process():
    for function in ("library", "_available", "_why_not"):
        getattr(native_library, function).cache_clear()


def test_compiled_once(new_machine, monkeypatch, compiled):
    for _ in range(2):
        in_a_new_process()
        native_library.library(torch.float32)
    assert len(compiled) == 1
    native_library.library(torch.float64)
    monkeypatch.setattr(native_library, "processor", lambda: "another processor")
    in_a_new_process()
    native_library.library(torch.float32)
    assert len(compiled) == 3
    assert len(list(new_machine.iterdir())) == 3


def works():
    layer, x = SteerableConv2d(2, 3, 3, "c8", strategy="native"), torch.rand(1, 16, 9, 9)
    with torch.no_grad():
        y, layer.strategy = layer(x), "expand"
        return torch.allclose(y, layer(x), atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty", "another library", "link", "pipe", "folder"])
def test_a_damaged_library_is_compiled_again(new_machine, compiled, damage):
    native_library.library(torch.float32)
    (path,) = new_machine.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        path.write_bytes(content[:5000] + bytes(100) + content[5100:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another library":
        native_library.library(torch.float64)
        (other,) = set(new_machine.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
        compiled.clear()
        compiled.append("the first")
    elif damage == "link":
        elsewhere = new_machine.parent / "elsewhere.so"
        elsewhere.write_bytes(content)
        path.unlink()
        path.symlink_to(elsewhere)
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    in_a_new_process()
    if damage == "folder":  # replaced by nothing that is ours
        with pytest.raises(ValueError, match=r"has no place for its library: .*directory"):
            works()
    else:
        assert works()
        assert path.is_file()
        assert not path.is_symlink()
        assert path.read_bytes() == content
    assert len(compiled) == (1 if damage == "folder" else 2)


def test_what_others_can_have_written_is_not_loaded(new_machine, compiled, monkeypatch):
    native_library.library(torch.float32)
    (path,) = new_machine.iterdir()
    assert (path.stat().st_mode & 0o777, new_machine.stat().st_mode & 0o777) == (0o600, 0o700)
    layer, shape = SteerableConv2d(100, 100, 3, "c8"), (8, 800, 14, 14)
    for changed, mode, back in ((path, 0o622, 0o600), (new_machine, 0o777, 0o700)):
        changed.chmod(mode)
        in_a_new_process()
        with pytest.warns(RuntimeWarning, match=r"slower convolutions are used: .*others may write"):
            assert layer.strategy_for(shape, torch.device("cpu")) == "block_diagonal"
        with pytest.raises(ValueError, match="chmod go-w"):
            works()
        changed.chmod(back)
    in_a_new_process()
    assert works()
    user = os.geteuid()
    monkeypatch.setattr(native_library.os, "geteuid", lambda: user + 1)
    in_a_new_process()
    with pytest.raises(ValueError, match=f"belongs to user {user}, this process to {user + 1}"):
        works()
    assert len(compiled) == 1


def test_a_changed_file_does_not_change_what_is_loaded(new_machine):
    assert works()
    (path,) = new_machine.iterdir()
    path.write_bytes(b"")  # a mapped file would now end the process
    assert works()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sleep 60 & wait", "did not end in 1 s"),
        ('[ "$1" = --version ] || { while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"; }', "cannot be loaded"),
        ("exit 0", "compiled nothing"),
    ],
)
def test_compilers_that_hang_or_make_nothing_of_use(new_machine, monkeypatch, tmp_path, script, says):
    compiler = tmp_path / "some-cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native_library, "_TIME_LIMIT", 1)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=f"slower convolutions are used: .*({says})"):
        assert not native_library.available()
    assert time.monotonic() - start < 10
    with pytest.raises(ValueError, match=says):
        works()
    assert not new_machine.exists() or not list(new_machine.iterdir())


def test_sizes_of_c_and_python_agree(new_machine, monkeypatch):
    """Names in the same order, too: a size does not tell two fields that changed places."""
    text = native_library._SOURCE.read_text()
    fields = re.sub(r"/\*.*?\*/", "", re.search(r"typedef struct \{([^}]*)\} Layer;", text)[1])
    names = [name for names in re.findall(r"(?:long|REAL|Sparse)\b([^;]*);", fields) for name in names.split(",")]
    assert [name.strip(" *") for name in names] == [name for name, _ in native_library.CLayer._fields_]

    class Longer(native_library.CLayer):
        _fields_ = (("one_more", ctypes.c_long),)

    monkeypatch.setattr(native_library, "CLayer", Longer)
    size = ctypes.sizeof(Longer)
    with pytest.raises(ValueError, match=f"has {size - 8} bytes in native.c and {size} in native_library.py"):
        works()
    assert not list(new_machine.iterdir())


def test_a_library_without_one_of_the_functions(new_machine, monkeypatch):
    monkeypatch.setenv("CC", "cc -Dlayer_size=other_size")
    with pytest.raises(ValueError, match=r"what was compiled has no function 'layer_size'. Name another compiler"):
        works()
    assert not list(new_machine.iterdir())


def test_interrupted(new_machine, monkeypatch, tmp_path):
    """Ctrl-C ends the compiler and what it started, and leaves nothing."""
    compiler = tmp_path / "some-cc"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\n'
        f"sleep 60 & echo $! > {tmp_path}/child; kill -INT {os.getpid()}; wait\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started us behind &
    try:
        with pytest.raises(KeyboardInterrupt):
            works()
    finally:
        signal.signal(signal.SIGINT, before)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)
    assert not list(new_machine.iterdir())
    monkeypatch.delenv("CC")
    assert works()


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("compiler", "says"),
    [("cc '", "No closing quotation.*name a C compiler"), ("{}/some-cc", "cannot be started.*Exec format error")],
)
def test_compilers_that_cannot_be_started(new_machine, monkeypatch, tmp_path, compiler, says):
    (tmp_path / "some-cc").write_bytes(b"\x7fELF, of another machine")
    (tmp_path / "some-cc").chmod(0o755)
    monkeypatch.setenv("CC", compiler.format(tmp_path))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert not any(native_library.available() for _ in range(2))
    assert len(warned) <= 1
    with pytest.raises(ValueError, match=says):
        works()


@pytest.mark.parametrize("cache_home", ["", "some/folder"])
def test_caches_that_are_no_path(new_machine, monkeypatch, tmp_path, cache_home):
    """As the XDG specification says, a relative path is ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert works()
    assert len(list((tmp_path / ".cache/equivision_timm/native").iterdir())) == 1
    assert not (tmp_path / "some").exists()


def test_no_home_folder(new_machine, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    with pytest.warns(RuntimeWarning, match="this user has no home folder, HOME is 'relative': name one"):
        assert not native_library.available()


def test_what_others_put_in_the_compilers_place_is_not_loaded(new_machine, monkeypatch):
    """Whoever may write a folder above can exchange what the compiler makes, before it is read."""
    user = os.geteuid()
    monkeypatch.setattr(native_library, "_folder", lambda: new_machine.parent.parent)
    monkeypatch.setattr(native_library.os, "geteuid", lambda: user + 1)
    with pytest.raises(ValueError, match=f"library.so belongs to user {user}"):
        works()


@pytest.mark.parametrize("memory", [True, False], ids=["in memory", "in a file"])
def test_where_nothing_can_be_executed(tmp_path, memory):
    """A file system mounted `noexec` does for the cache, and for temporary files where memory can be used."""
    code = f"""
import os, sys, warnings, torch
if not {memory}:
    del os.memfd_create
from equivision_timm.layers.strategies.native_library import available
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    print([available() for _ in range(2)], [str(w.message) for w in warned])
"""
    mount = f"mount -t tmpfs -o noexec,size=20m none {tmp_path} && exec {shlex.join([sys.executable, '-c', code])}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = subprocess.run(["unshare", "--mount", "sh", "-c", mount], env=environment, capture_output=True, text=True)
    if "unshare failed" in run.stderr or "mount:" in run.stderr:
        pytest.skip(f"no file system can be mounted here: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    if memory:
        assert run.stdout == "[True, True] []\n"
    else:
        assert run.stdout.startswith("[False, False] ")
        assert run.stdout.count("slower convolutions are used: ") == 1
        assert "cannot be loaded" in run.stdout


def test_a_path_that_is_too_long(new_machine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 5000}")
    with pytest.warns(RuntimeWarning, match="slower convolutions are used: .*too long"):
        assert not native_library.available()


def test_two_processes_compile_at_once(new_machine):
    code = (
        "import torch; from equivision_timm.layers.strategies.native_library import library; "
        "print(library(torch.float32))"
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


def test_another_kind_of_threads(new_machine, monkeypatch):
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda path: object())
    with pytest.raises(ValueError, match="PyTorch's threads here are not those of GNU OpenMP"):
        SteerableConv2d(1, 1, 1, "c8", strategy="native")


def test_systems_without_gnu_openmp(new_machine, monkeypatch):
    """Windows has no such threads, nor some of `os`: the package is imported and computes all the same."""
    gone = ("register_at_fork", "geteuid", "killpg", "memfd_create", "O_NOFOLLOW", "O_NONBLOCK")
    code = f"import os, timm\nfor name in {gone}: delattr(os, name)\nimport equivision_timm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(native_library, "os", SimpleNamespace(name="nt", environ={}))
    with pytest.raises(ValueError, match="not those of GNU OpenMP"):
        works()
    model = timm.create_model("test_c8resnet").eval()
    assert "native" not in model.conv_strategies(65).values()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 65, 65)).isfinite().all()


def test_a_compiler_from_a_package(tmp_path):
    """Found by itself where the system has none."""
    pytest.importorskip("ziglang", reason="extra `native`: a C compiler as a package")
    code = (
        "from equivision_timm.layers.strategies import native_library as n; import torch; "
        "print(n._compiler()[1:]); n.library(torch.float32)"
    )
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path)}
    environment |= {"ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig"), "CC": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "['-m', 'ziglang', 'cc']\n"
    assert len(list((tmp_path / "equivision_timm" / "native").iterdir())) == 1


def test_fingerprints_tell_what_changed():
    native_library.library(torch.float32)
    threads = torch.get_num_threads()
    values = torch.randn((1 << 18) + 7)
    changed = [values, -values, values.roll(1), values.flip(0), values[:-1], values[None], values.double()]
    changed += [  # negated in pairs, in words of one lane or of several
        torch.where(torch.arange(len(values)) % step == 0, -values, values) for step in (2, 32, 64, len(values) - 1)
    ]
    for place in (0, 1 << 17, len(values) - 1):
        changed.append(values.clone())
        changed[-1][place] += 1
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append([native_library.fingerprint([one, values[:3]]) for one in changed])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == len(changed)
    assert native_library.fingerprint([values.clone(), values[:3]]) == found[0][0]
    assert native_library.fingerprint([torch.zeros(4, 4).t()]) is None
    assert native_library.fingerprint([torch.zeros(0)]) != native_library.fingerprint([torch.zeros(1)])
