"""The compiled form of `native.c`: built once on each machine by the system's C compiler, and kept.

The compiler is `cc`, or what the environment variable CC names; it compiles for this processor, in seconds. The library
lies in the user's cache folder, with its hash in its name. It is loaded only if it is whole, and if nobody else can
have written it.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

__all__ = ["available", "library", "why_not"]

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_TIME_LIMIT = 120  # seconds for the compiler, which takes two
_REMEDY = "Name another compiler in the environment variable CC, or use conv_strategy='block_diagonal'"
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
    made_of = (_SOURCE.read_text(), *command, _run(command[0], "--version"), platform.machine(), _processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    try:
        folder = _folder()
        content = _kept(folder, digest) or _compile(command, folder, digest)
        loaded = _load(content)
    except OSError as error:
        raise RuntimeError(
            f"conv_strategy 'native' has no place for its library: {error}. Name a folder that can be written in the "
            "environment variable XDG_CACHE_HOME, or use conv_strategy='block_diagonal'"
        ) from error
    loaded.packed_size.restype = loaded.sums_size.restype = ctypes.c_long
    return loaded


def _folder() -> Path:
    """Where libraries are kept.

    Raises:
        OSError: it cannot be made.
        PermissionError: others may have put something there.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache_home if os.path.isabs(cache_home) else "~/.cache").expanduser() / "equivision_timm/native"
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
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # a link, or removed meanwhile: made anew under the same name
            continue
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                continue
            _check_ours(status, path)
            content = file.read()
        if path.name == _name(digest, content):
            return content
        path.unlink(missing_ok=True)  # cut, or overwritten
    return None


def _name(digest: str, content: bytes) -> str:
    return f"{digest}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compile(command: list[str], folder: Path, digest: str) -> bytes:
    """Compile, and keep the library under its name; raises RuntimeError with what the compiler says."""
    with tempfile.TemporaryDirectory(dir=folder) as own:  # an interrupted process leaves no half library
        made = Path(own) / "library.so"
        _run(*command, "-o", str(made), str(_SOURCE), check=True)
        if not made.is_file():
            raise RuntimeError(f"conv_strategy 'native': {command[0]} compiled nothing. {_REMEDY}")
        content = made.read_bytes()
        _load(content)  # keep nothing that cannot be loaded
        made.chmod(0o600)
        made.replace(folder / _name(digest, content))
    return content


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
    missing = [
        name for name in ("pack", "forward", "backward", "packed_size", "sums_size") if not hasattr(loaded, name)
    ]
    if missing:
        raise RuntimeError(f"conv_strategy 'native': what was compiled has no function {missing[0]!r}. {_REMEDY}")
    return loaded


def _run(*command: str, check: bool = False) -> str:
    """What the compiler prints; ended, with all that it started, after a time.

    Raises:
        RuntimeError: it takes too long; or it fails, if `check`.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as run:
        try:
            printed, _ = run.communicate(timeout=_TIME_LIMIT)
        except BaseException as error:  # the time limit, Ctrl-C
            os.killpg(run.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RuntimeError(
                f"conv_strategy 'native': {shlex.join(command)} did not end in {_TIME_LIMIT} s. {_REMEDY}"
            ) from error
    if check and run.returncode:
        raise RuntimeError(
            f"conv_strategy 'native' could not be compiled: {shlex.join(command)} says\n{printed}\n{_REMEDY}"
        )
    return printed


def _processor() -> str:
    """What tells processors apart: a home folder may serve several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
