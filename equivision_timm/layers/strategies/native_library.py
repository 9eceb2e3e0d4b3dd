"""The compiled form of `native.c`: built once on each machine by the system's C compiler, and kept.

The compiler is what the environment variable CC names, or `cc`, or else the one of the package ziglang; it compiles for
this processor, in seconds. The library lies in the user's cache folder, with its hash in its name. It is loaded only if
it is whole, and if nobody else can have written it.
"""

import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from equivision_timm.files import cache_folder
from equivision_timm.layers.strategies.context import is_plain

__all__ = ["CLayer", "CSparse", "available", "fingerprint", "library", "processor", "why_not"]

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_TIME_LIMIT = 120  # seconds for the compiler, which takes two
_REMEDY = "Name another compiler in the environment variable CC, or use conv_strategy='block_diagonal'"
_SIZES = ("layer_size", "packed_size", "sums_size")  # functions that return a long
_REALS = {torch.float32: "float", torch.float64: "double"}


class CSparse(ctypes.Structure):
    """A sparse matrix, row by row, as native.c sees it."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("starts", "columns", "values")]


class CLayer(ctypes.Structure):
    """A layer, as native.c sees it."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("order", "in_fields", "out_fields")),
        *((name, ctypes.c_long) for name in ("kernel_size", "low_pass", "stride", "dilation")),
        *((name, ctypes.c_long) for name in ("batch", "in_height", "in_width", "out_height", "out_width")),
        *((name, ctypes.c_long) for name in ("images", "rows", "n_blocks", "functions")),
        *((name, ctypes.c_void_p) for name in ("sizes", "copies", "fourier", "fourier_transposed")),
        ("terms", CSparse),
        ("terms_transposed", CSparse),
    ]


@torch.compiler.assume_constant_result  # torch.compile asks it once, and does not look inside
def available() -> bool:
    """Whether this machine can run `native.c`; a compiler that fails is warned of, once in a process."""
    return _available()


@cache
def _available() -> bool:
    try:
        library(torch.float32)
    except RuntimeError as error:
        if not why_not():
            warnings.warn(f"slower convolutions are used: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """What this machine lacks to compile and run `native.c`, and the remedy; None if nothing."""
    return _why_not()


@cache
def _why_not() -> str | None:
    try:
        name = _compiler()[0]
    except ValueError as error:
        return f"CC={os.environ['CC']!r} cannot be read ({error}): name a C compiler"
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return "PyTorch's threads here are not those of GNU OpenMP (on Linux they are)"
    if shutil.which(name) is None:
        return (
            f"there is no C compiler {name!r}: install one (Debian: apt install gcc; or pip install ziglang, the extra "
            "`native`), or name yours in the environment variable CC"
        )
    return None


def _compiler() -> list[str]:
    """The environment variable CC; or `cc`; or, where there is none, that of the package ziglang, if it is there."""
    named = shlex.split(os.environ.get("CC", ""))
    if named or shutil.which("cc") or not importlib.util.find_spec("ziglang"):
        return named or ["cc"]
    return [sys.executable, "-m", "ziglang", "cc"]


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """`native.c` for arrays of `dtype`, float32 or float64; compiled if that was not done on this machine before.

    Raises:
        RuntimeError: this machine lacks something, or the compiler fails; with what it says.
    """
    lacks = why_not()
    if lacks:
        raise RuntimeError(f"conv_strategy 'native' cannot run: {lacks}")
    name, *options = _compiler()
    command = [shutil.which(name), *options, *_FLAGS, f"-DREAL={_REALS[dtype]}"]  # gcc without PATH needs all of it
    version = _run(command[0], *options, "--version")
    made_of = (_SOURCE.read_text(), *command, version, platform.machine(), processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    try:
        folder = _folder()
        kept = _kept(folder, digest)
        loaded = _load(kept) if kept else _compile(command, folder, digest)
    except OSError as error:
        raise RuntimeError(
            f"conv_strategy 'native' has no place for its library: {error}. Name a folder that can be written in the "
            "environment variable XDG_CACHE_HOME, or use conv_strategy='block_diagonal'"
        ) from error
    _loaded[dtype] = loaded
    return loaded


_loaded: dict[torch.dtype, ctypes.CDLL] = {}


def fingerprint(tensors: Sequence[torch.Tensor]) -> tuple[Hashable, ...] | None:
    """What tells these values from all others, but for a chance of 2^-64.

    None where nothing has been compiled so far, or a tensor does not lie in one stretch of memory of the CPU.
    """
    if not _loaded or not all(_is_one_stretch(t) for t in tensors):
        return None
    count, compiled = len(tensors), next(iter(_loaded.values()))
    parts = (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors])
    sizes = (ctypes.c_long * count)(*[t.nbytes for t in tensors])
    bits = compiled.fingerprint(parts, sizes, ctypes.c_long(count), ctypes.c_long(torch.get_num_threads()))
    return bits, *((t.dtype, t.shape, t.stride()) for t in tensors)


def _is_one_stretch(tensor: torch.Tensor) -> bool:
    if tensor.device.type != "cpu" or not is_plain(tensor):
        return False
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return dense and not tensor.is_neg()


def _folder() -> Path:
    """Where libraries are kept.

    Raises:
        OSError: it cannot be made.
        PermissionError: others may have put something there.
    """
    folder = cache_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_ours(folder.stat(), folder)
    return folder


def _check_ours(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError where somebody else than this user may have written `path`."""
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, this process to {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write {path}: chmod go-w {path}")


def _kept(folder: Path, digest: str) -> bytes | None:
    """The library that was compiled before, if it is whole: its name holds the hash of what it must contain."""
    for path in folder.glob(f"{digest}-*.so"):
        content = _content(path)
        if content is None:  # made anew under the same name
            continue
        if path.name == _name(digest, content):
            return content
        path.unlink(missing_ok=True)  # cut, or overwritten
    return None


def _content(path: Path) -> bytes | None:
    """What a file of this user alone holds; None if it is a link, a pipe, or was removed meanwhile.

    Raises:
        IsADirectoryError: it is a folder.
        PermissionError: others may have written it.
    """
    try:
        with open(path, "rb", opener=_open_in_place) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None
            _check_ours(status, path)
            return file.read()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOENT):
            return None
        raise


def _open_in_place(name: str, flags: int) -> int:
    """Follows no link, waits for nobody at a pipe."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _name(digest: str, content: bytes) -> str:
    return f"{digest}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compile(command: list[str], folder: Path, digest: str) -> ctypes.CDLL:
    """Compile, load, and keep the library under its name; raises RuntimeError with what the compiler says."""
    with tempfile.TemporaryDirectory(dir=folder) as own:  # an interrupted process leaves no half library
        made = Path(own) / "library.so"
        _run(*command, "-o", str(made), str(_SOURCE), check=True)
        if not made.is_file():
            raise RuntimeError(f"conv_strategy 'native': {command[0]} compiled nothing. {_REMEDY}")
        made.chmod(0o600)
        content = _content(made) or b""
        loaded = _load(content)  # keep nothing that cannot be loaded
        made.replace(folder / _name(digest, content))
    return loaded


def _load(content: bytes) -> ctypes.CDLL:
    """The library of these bytes and no others: from memory, where nobody can change them after they were checked."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("equivision_timm")  # stays open: a later file of its number would pass for it
        path, file = f"/proc/self/fd/{descriptor}", open(descriptor, "wb", closefd=False)  # noqa: SIM115
    else:
        file = tempfile.NamedTemporaryFile(suffix=".so")  # noqa: SIM115  of this user alone
        path = file.name
    with file:
        file.write(content)
        file.flush()
        try:
            loaded = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(
                f"conv_strategy 'native': what was compiled cannot be loaded ({error}). {_REMEDY}"
            ) from error
    missing = [name for name in (*_SIZES, "pack", "forward", "backward", "fingerprint") if not hasattr(loaded, name)]
    if missing:
        raise RuntimeError(f"conv_strategy 'native': what was compiled has no function {missing[0]!r}. {_REMEDY}")
    for name in _SIZES:
        getattr(loaded, name).restype = ctypes.c_long
    loaded.fingerprint.restype = ctypes.c_uint64
    if loaded.layer_size() != ctypes.sizeof(CLayer):
        raise RuntimeError(
            f"conv_strategy 'native': a layer has {loaded.layer_size()} bytes in native.c and {ctypes.sizeof(CLayer)} "
            "in native_library.py, which are not of one version: install equivision_timm again"
        )
    return loaded


def _run(*command: str, check: bool = False) -> str:
    """What the compiler prints; ended, with all that it started, after a time.

    It runs in a thread: Ctrl-C interrupts the main thread only, so never between the start and what ends it.

    Raises:
        RuntimeError: it cannot be started, or takes too long; or it fails, if `check`.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            printed, code = thread.submit(_watch, command, stop).result()
        finally:
            stop.set()
    if check and code:
        raise RuntimeError(
            f"conv_strategy 'native' could not be compiled: {shlex.join(command)} says\n{printed}\n{_REMEDY}"
        )
    return printed


def _watch(command: tuple[str, ...], stop: threading.Event) -> tuple[str, int]:
    """What a command prints, and its exit status; killed with its whole group on `stop` or after the time limit."""
    try:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeError(f"conv_strategy 'native': {command[0]} cannot be started ({error}). {_REMEDY}") from error
    end = time.monotonic() + _TIME_LIMIT
    with started as run:
        while True:
            try:
                printed, _ = run.communicate(timeout=0.05)
                return printed, run.returncode
            except subprocess.TimeoutExpired:
                if not stop.is_set() and time.monotonic() < end:
                    continue
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            raise RuntimeError(
                f"conv_strategy 'native': {shlex.join(command)} did not end in {_TIME_LIMIT} s. {_REMEDY}"
            )


def processor() -> str:
    """What tells processors apart: a home folder may serve several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
