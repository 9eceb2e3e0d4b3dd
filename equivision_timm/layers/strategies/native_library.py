"""The compiled form of `native.c`, which the build of the package placed beside it (`build_native.py`)."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from equivision_timm.errors import install_command
from equivision_timm.layers.strategies.build_native import LEVELS, source_hash

__all__ = ["CLayer", "CSparse", "describe", "library", "why_not"]

FOLDER = Path(__file__).parent  # of the libraries
_REMEDY = f"with a C compiler, {install_command(options=' --force-reinstall --no-deps --no-cache-dir')}"


class CSparse(ctypes.Structure):
    """`Sparse` of native.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("starts", "columns", "values")]


class CLayer(ctypes.Structure):
    """`Layer` of native.c."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("order", "in_fields", "out_fields")),
        *((name, ctypes.c_long) for name in ("kernel_size", "low_pass", "stride", "dilation")),
        *((name, ctypes.c_long) for name in ("batch", "in_height", "in_width", "out_height", "out_width")),
        *((name, ctypes.c_long) for name in ("images", "rows", "n_blocks", "functions")),
        *((name, ctypes.c_void_p) for name in ("sizes", "copies", "fourier", "fourier_transposed")),
        ("terms", CSparse),
        ("terms_transposed", CSparse),
        *((name, ctypes.c_long) for name in ("n_basis", "n_entries")),
        ("entries", CSparse),
    ]


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """The reason why the compiled code cannot be used here, and the remedy; None if it can."""
    try:
        for dtype in (torch.float32, torch.float64):
            library(dtype)
    except RuntimeError as error:
        return str(error)
    return None


def describe() -> str:
    """The level of instructions that the compiled code uses here, or why there is no compiled code."""
    return why_not() or f"compiled for {_find('float').stem.split('-')[2]}"


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The functions of `native.c` for arrays of `dtype`, float32 or float64; RuntimeError if they cannot be used."""
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        raise RuntimeError("PyTorch does not use the threads of GNU OpenMP here (on Linux it does)")
    path = _find({torch.float32: "float", torch.float64: "double"}[dtype])
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.source_hash.restype = ctypes.c_char_p
        current = loaded.source_hash().decode() == source_hash()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the compiled code cannot be loaded ({error}): {_REMEDY}") from error
    if not current:
        raise RuntimeError(f"{path.name} was compiled from another native.c: {_REMEDY}")
    for name in ("tile_rows", "packed_size", "sums_size"):
        getattr(loaded, name).restype = ctypes.c_long
    return loaded


def _find(real: str) -> Path:
    """The library of the highest level that this processor has; of the lowest level if there is none."""
    highest = torch.backends.cpu.get_cpu_capability().lower()
    levels = list(LEVELS)[: list(LEVELS).index(highest) + 1] if highest in LEVELS else ["baseline"]
    paths = [FOLDER / f"native-{real}-{level}.so" for level in reversed(levels)]
    return next(filter(Path.is_file, paths), paths[-1])
