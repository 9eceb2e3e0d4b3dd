"""The coordinates of published weights: bases that escnn 1.0.11 made for six groups, as data.

The kernels they span are those of the closed form, so that a table is a change of coordinates, a square matrix C
[n_basis, J * H] (`basis.py`). It cannot be computed: the D_4 and D_8 bases of escnn change sign with the linear-algebra
library of the machine. `tables.safetensors` holds them; `manifest.json` their origin, the rings of their functions, a
sha256 of each, and for every element of the original's kernels the harmonic, frequency and irreps.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from equivision_timm.constants import constant
from equivision_timm.kernel_bases.kernel import Kernel, Ring

__all__ = ["load_table", "manifest", "sha256", "table_key"]

FOLDER = Path(__file__).parent


@cache
def manifest() -> dict[str, Any]:
    """Where the tables come from: escnn version, sha256, ring profiles, and the harmonics of every basis element."""
    return json.loads((FOLDER / "manifest.json").read_text())


def table_key(kernel: Kernel) -> str:
    """What a table of kernels of this group, size and type of input is called: 'd4/3x3/regular'."""
    return f"{kernel.group}/{kernel.size}x{kernel.size}/{kernel.input_type}"


def load_table(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """C [n_basis, J, H] and he_std [n_basis] of the kernels, float64, on the CPU; None where there is no table.

    Raises:
        RuntimeError: the table is not the one that the manifest describes.
    """
    key = table_key(kernel)
    if key not in manifest()["tables"] or kernel.low_pass:
        return None
    if kernel.rings != tuple(Ring(**ring) for ring in manifest()["rings"][str(kernel.size)]):
        return None
    coefficients, he_std = _tables()[f"{key}/coefficients"], _tables()[f"{key}/he_std"]
    found, expected = sha256(coefficients, he_std), manifest()["tables"][key]
    if found != expected:
        raise RuntimeError(
            f"the kernel basis {key} is damaged: sha256 {found}, expected {expected}; reinstall equivision-timm"
        )
    return coefficients, he_std


def sha256(*tensors: torch.Tensor) -> str:
    """Of the shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


@constant
def _tables() -> dict[str, torch.Tensor]:
    return load((FOLDER / "tables.safetensors").read_bytes())
