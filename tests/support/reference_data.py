"""Figures of the original network (`data/reference`), and the weights and images they were computed with.

The original equivision network was run on escnn 1.0.11, float32, CPU. Neither weights nor images are stored: each
tensor has a numpy PCG64 stream of its own, seeded by (crc32 of its name, seed), so names and shapes are enough.
"""

import json
import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

__all__ = ["checkpoint", "figures", "image", "load_bases", "networks", "sign_patterns", "training_runs"]

FOLDER = Path(__file__).parents[1] / "data" / "reference"


@cache
def networks() -> dict[str, dict]:
    """Per network its `parameters`, the `state_dict` as published {name: shape}, and `conv_in_fields` {name: n}."""
    return json.loads((FOLDER / "networks.json").read_text())


@cache
def training_runs() -> dict[str, dict]:
    """For each trained network the setting, the losses of four steps, and gradient norms of the first."""
    return {run["model"]: run for run in json.loads((FOLDER / "training.json").read_text())}


@cache
def load_bases() -> dict[str, torch.Tensor]:
    """`<group>/<k>x<k>/<input type>`: [n_basis, |G|, H, k, k]; its `/he_std`; `<group>/regular_representation`."""
    return load_file(FOLDER / "bases.safetensors")


@cache
def sign_patterns() -> list[dict[str, list[int]]]:
    """The five ways in which escnn signs its D4 and D8 bases: per basis the elements that are negated."""
    return [
        pattern["negated_elements"] for pattern in json.loads((FOLDER / "sign-patterns.json").read_text())["patterns"]
    ]


def figures(name: str, size: int) -> dict[str, np.ndarray]:
    """Logits [1000]; for `maxpool`, `layer1` ... `layer4` the `/shape`, `/meanstd` and channels at the `/centre`."""
    with np.load(FOLDER / "logits" / f"{name}.npz") as archive:
        prefix = f"s0/{size}/"
        return {key.removeprefix(prefix): archive[key] for key in archive if key.startswith(prefix)}


def checkpoint(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of network `name`, in the original's names."""
    network = networks()[name]
    state = {}
    for key, shape in network["state_dict"].items():
        value = _draw(key, tuple(shape), seed)
        if key in network["conv_in_fields"]:
            value = value * np.float32(1 / math.sqrt(6 * network["conv_in_fields"][key]))
        state[key] = torch.from_numpy(np.asarray(value))
    return state


def image(shape: tuple[int, int, int, int], seed: int = 0) -> torch.Tensor:
    """Smooth random images [B, C, H, W], float32: 9 x 9 random values, interpolated, and a little noise."""
    rng = _stream("image", seed)
    coarse = torch.from_numpy(rng.normal(size=(*shape[:2], 9, 9)))
    smooth = F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=True)
    return (smooth + 0.1 * torch.from_numpy(rng.normal(size=shape))).float()


def _stream(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = _stream(name, seed)
    match name.rsplit(".", 1)[-1]:
        case "num_batches_tracked":
            return np.array(1000)
        case "running_var":
            value = rng.uniform(0.5, 1.5, shape)
        case "running_mean" | "bias":
            value = rng.normal(0, 0.1, shape)
        case "weights":  # coefficients of a convolution; the spread differs between layers
            value = rng.uniform(0.9, 1.1) * rng.normal(size=shape)
        case _ if "batch_norm" in name:
            value = rng.uniform(0.3, 0.7, shape)
        case _:
            value = rng.normal(0, 0.05, shape)
    return value.astype(np.float32)
