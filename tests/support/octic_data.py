"""Figures of the octic-vits modules (`data/octic`), and the weights that they were computed with.

The authors' modules were run in float32 on the CPU, their Triton GELU replaced by its formula. No weights are stored:
every tensor is drawn from a numpy PCG64 stream of its own, seeded by (crc32 of its name, 0), as in `reference_data`.
"""

import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch

from equivision_timm.models import EquivariantViT

__all__ = ["SMALL", "cases", "checkpoint", "figures", "small_model"]

FOLDER = Path(__file__).parents[1] / "data" / "octic"
SMALL = ("deit_power", "deit_polynomial", "deit_hybrid", "dinov2_power", "dinov2_hybrid")


@cache
def cases() -> dict[str, dict]:
    """Per case: its `invariants` (None: hybrid), `config`, number of `parameters`, `shapes`, what is `frozen_zero`."""
    return json.loads((FOLDER / "cases.json").read_text())


def figures(case: str) -> dict[str, torch.Tensor]:
    """`output`, and tokens `embedded`, `octic`, `handed_over`, `normed`; of large cases the first, second and last."""
    with np.load(FOLDER / f"{case}.npz") as archive:
        return {name.split("/")[1]: torch.from_numpy(archive[name]) for name in archive}


def checkpoint(case: str) -> dict[str, torch.Tensor]:
    """A state dict in the naming of octic-vits, weights scaled so that every block matters."""
    zero = set(cases()[case]["frozen_zero"])
    return {
        name: torch.zeros(shape) if name in zero else torch.from_numpy(_draw(name, tuple(shape)))
        for name, shape in cases()[case]["shapes"].items()
    }


def small_model(case: str, **keywords) -> EquivariantViT:
    """Our network for a small case."""
    config = {
        key: cases()[case]["config"][key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    }
    classes = cases()[case]["config"].get("num_classes", 0)
    invariants = cases()[case]["invariants"] or ""
    keywords = {**config, "num_classes": classes, "invariants": invariants, **keywords}
    return timm.create_model("d4vit_tiny_patch16_224", **keywords).eval()


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    stream = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), 0]))
    value, leaf = stream.standard_normal(shape, dtype=np.float32), name.rsplit(".", 1)[-1]
    is_norm = name.startswith("norm") or ".norm" in name
    if "gamma" in name or ".ls" in name or "alpha" in name or (is_norm and leaf == "weight"):
        value = 0.5 + 0.1 * value
    elif leaf in ("bias", "beta"):
        value = 0.1 * value
    elif len(shape) in (2, 4) and leaf == "weight":
        value = value / np.float32(math.sqrt(math.prod(shape[1:])))
    else:
        value = 0.3 * value
    return value.astype(np.float32)
