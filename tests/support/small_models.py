"""Small real data and saved models for the tests of commands: photographs of three textures from scikit-image."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf

import equivision_timm  # noqa: F401  registers the models

TEXTURES = ("brick", "grass", "gravel")


def write_textures(folder: Path, train: int = 32, validation: int = 16, size: int = 64) -> Path:
    """`folder`/{train,validation}/{brick,grass,gravel}/*.png: crops from the halves of a photograph."""
    data = pytest.importorskip("skimage.data", reason="real images for this test come from scikit-image")
    random = np.random.default_rng(0)
    for name in TEXTURES:
        photograph = getattr(data, name)()
        half = photograph.shape[1] // 2
        for split, count, left in (("train", train, 0), ("validation", validation, half)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                y, x = random.integers(0, photograph.shape[0] - size), left + random.integers(0, half - size)
                Image.fromarray(photograph[y : y + size, x : x + size]).save(folder / split / name / f"{i:03}.png")
    return folder


def save_small_model(
    folder: Path, name: str = "c4resnet18_fast", size: int = 33, num_classes: int = 3, **model_args
) -> str:
    """A narrow model with random weights and non-trivial norms, saved; returns the name that `create_model` takes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **model_args)
    model.train()
    with torch.no_grad():
        for _ in range(3):  # running statistics other than 0 and 1
            model(torch.randn(8, 3, size, size))
    model.pretrained_cfg.update(input_size=(3, size, size), crop_pct=1.0)
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    return f"local-dir:{folder}"
