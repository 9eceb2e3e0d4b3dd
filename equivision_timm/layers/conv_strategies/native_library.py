"""The compiled form of `native.c`: built once on each machine by the system's C compiler, and kept.

The compiler is `cc`, or what the environment variable CC names; it compiles for this processor, in seconds. The library
lies in the user's cache folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

__all__ = ["available", "library", "why_not"]

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_REALS = {torch.float32: "float", torch.float64: "double"}


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


def why_not() -> str | None:
    """What this machine lacks to compile and run `native.c`, and the remedy; None if nothing."""
    name = _compiler()[0]
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return "PyTorch's threads here are not those of GNU OpenMP (on Linux they are): use conv_strategy='auto'"
    if shutil.which(name) is None:
        return (
            f"there is no C compiler {name!r}: install one (Debian: apt install gcc), name yours in the "
            "environment variable CC, or use conv_strategy='auto'"
        )
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


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
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    made_of = (_SOURCE.read_text(), *command, version, platform.machine(), _processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / f"equivision_timm/native/{digest}.so"
    if not path.exists():
        _compile(command, path)
    loaded = ctypes.CDLL(str(path))
    loaded.packed_size.restype = loaded.sums_size.restype = ctypes.c_long
    return loaded


def _compile(command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:  # an interrupted process leaves no half library
            made = Path(own) / path.name
            run = subprocess.run([*command, "-o", str(made), str(_SOURCE)], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(
                    f"conv_strategy 'native' could not be compiled: {shlex.join(run.args)} says\n{run.stderr}\n"
                    "Name another compiler in the environment variable CC, or use conv_strategy='block_diagonal'"
                )
            made.replace(path)
    except OSError as error:
        raise RuntimeError(
            f"conv_strategy 'native' has no place for its library: {error}. Name a folder that can be written in the "
            "environment variable XDG_CACHE_HOME, or use conv_strategy='block_diagonal'"
        ) from error


def _processor() -> str:
    """What tells processors apart: a home folder may serve several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
