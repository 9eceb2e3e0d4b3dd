"""The compiled strategy under sanitizers: random layers read and write nothing that is not theirs, nor without order.

Each runs in a process of its own, which loads the runtime of AddressSanitizer (with UBSan) or ThreadSanitizer first,
in float32: for float64 the same source is compiled. The controls are an access and a race that must be reported.
ThreadSanitizer does not see the barriers of GNU OpenMP: under it the library has teams of its own, `watched_threads.c`.
"""

import copy
import ctypes
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from equivision_timm.layers import NativeConv2d, SteerableConv2d
from equivision_timm.layers.strategies import build_native, native_call, native_library

LAYERS = 12
ADDRESS = "-fsanitize=address,undefined"
TEAMS = f"{Path(__file__).with_name('watched_threads.c')} -fsanitize=thread -DGOMP_parallel=watched_parallel "
TEAMS += "-Domp_get_thread_num=watched_number -Domp_get_num_threads=watched_threads"


def runtime(name):
    """Where the compiler has a shared library; None if nowhere."""
    if shutil.which("cc") is None:
        return None
    printed = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return printed if os.path.isabs(printed) else None


RUNTIMES = {  # the second library, since torch throws exceptions
    sanitizer: [runtime(name) for name in (library, "libstdc++.so.6")]
    for sanitizer, library in (("address", "libasan.so"), ("thread", "libtsan.so"))
}

pytestmark = pytest.mark.skipif(
    any(None in libraries for libraries in RUNTIMES.values()),
    reason="cc has no AddressSanitizer or ThreadSanitizer to load (Debian: apt install gcc)",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(options)`: a folder with the library that is compiled with these options, once for all tests.

    The last -O counts: at -O3 compiling takes half a minute, at -O1 nine seconds.
    """

    @cache
    def build(options: str) -> Path:
        folder, options = tmp_path_factory.mktemp("native"), ("-march=native", "-O0", "-g", *options.split())
        build_native.compile_library(folder / "native-float-baseline.so", "float", "baseline", ["cc"], options)
        return folder

    return build


def sanitized(folder: Path, sanitizer: str, function, layers: int, **variables: str):
    """One of the functions below, run with the library in `folder`."""
    environment = {
        "LD_PRELOAD": " ".join(RUNTIMES[sanitizer]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # PyTorch's teams are GNU OpenMP's
        "OMP_NUM_THREADS": "2",
        **variables,
    }
    command = [sys.executable, __file__, function.__name__, str(layers), str(folder)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, errors="replace")


def random_layers(count):
    """Outputs and gradients of `count` layers against the definition in float64."""
    torch.manual_seed(0)
    draw = random.Random(0)
    for index in range(count):
        group = draw.choice(["c1", "d1", "c3", "c4", "d4", "c6", "c8", "d8", "c16", "d10"])
        fields = [draw.choice([1, 2, 3, 5]) for _ in range(2)]
        kernel_size, low_pass = draw.choice([(1, False), (3, False), (5, False), (5, True)])
        steps = {"stride": draw.randint(1, 3), "dilation": draw.randint(1, 3)}
        batch, sizes = draw.randint(1, 3), [draw.choice([1, 2, 5, 8, 13, 17]) for _ in range(2)]
        torch.set_num_threads(draw.randint(1, 4))
        layer = SteerableConv2d(*fields, kernel_size, group, strategy="expand", low_pass=low_pass, **steps)
        exact, layer.strategy = copy.deepcopy(layer).double(), "native"  # only now: it would load float64, too
        x = torch.randn(batch, fields[0] * layer.order, *sizes, requires_grad=True)
        with torch.no_grad():
            alone = layer(x)
        y = layer(x)
        shortcut, bias, grad = torch.randn_like(y), torch.randn(fields[1]), torch.randn_like(y)
        with torch.no_grad():
            fused = NativeConv2d(layer.describe(x.device, x.dtype), layer.weight, bias, relu=True)(x, shortcut)
        found = [y, alone, fused, *torch.autograd.grad((y * grad).sum(), (x, layer.weight))]

        inputs = x.detach().double().requires_grad_()
        y = exact(inputs)
        joined = (y + bias.double().repeat_interleave(layer.order)[:, None, None] + shortcut.double()).relu()
        expected = [y, y, joined, *torch.autograd.grad((y * grad.double()).sum(), (inputs, exact.weight))]
        for a, b in zip(found, expected, strict=True):
            error = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < 1e-4, (index, layer, batch, sizes, error)
        print("right:", index)


def packed_too_short(_):
    """A size that overflows; then a product with packed weights that lack a column, of 14 rows at most."""
    x = torch.randn(1, 24, 9, 9)
    call = native_call._call("c8-3-regular", x.dtype, 5, 1, 1, x.shape, 1)
    layer, library, threads = call.layer, native_library.library(x.dtype), ctypes.c_long(1)
    packed = torch.zeros(call.sizes["packed"] - 14)
    layer.in_fields = 2**62
    library.sums_size(ctypes.byref(layer))
    layer.in_fields = 3
    y = torch.empty(call.shape)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, packed)]
    nothing = ctypes.c_void_p(None)
    library.forward(
        ctypes.byref(layer), *pointers, nothing, nothing, ctypes.c_long(0), ctypes.c_void_p(y.data_ptr()), threads
    )
    print("not noticed")


@pytest.mark.parametrize(("sanitizer", "options"), [("address", ADDRESS), ("thread", TEAMS)])
def test_random_layers(compiled, sanitizer, options):
    run = sanitized(compiled(options), sanitizer, random_layers, LAYERS)
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout.count("right:") == LAYERS
    assert "runtime error:" not in run.stderr
    assert "ThreadSanitizer" not in run.stderr


def test_wrong_memory_is_reported(compiled):
    run = sanitized(compiled(ADDRESS), "address", packed_too_short, 0)
    assert run.returncode != 0
    assert "not noticed" not in run.stdout
    assert "runtime error: signed integer overflow" in run.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert "native.c" in run.stderr


def test_a_race_is_reported(compiled):
    run = sanitized(compiled(TEAMS), "thread", random_layers, 3, RACE="1")
    assert "WARNING: ThreadSanitizer: data race" in run.stderr
    assert "native.c" in run.stderr


if __name__ == "__main__":
    name, count, folder = sys.argv[1:]
    native_library.FOLDER = Path(folder)
    {function.__name__: function for function in (random_layers, packed_too_short)}[name](int(count))
