"""Small real data, photographs of three textures from scikit-image, and models with norms that matter."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models._hub import save_for_hf

from equivision_timm.models.equivariant_resnet import VARIANTS

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


@contextlib.contextmanager
def narrow(*names: str, width: int = 4) -> Iterator[None]:
    """Within this context these ResNets have `width` fields in the first stage, so that files are small."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            variant = VARIANTS[name]
            patch.setitem(VARIANTS, name, dataclasses.replace(variant, arguments={**variant.arguments, "width": width}))
        yield


@torch.no_grad()
def stirred(model: nn.Module, size: int = 65) -> nn.Module:
    """`model` in eval mode, its norms with statistics of random images, and scales and shifts of their own."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.2, 0.2)
    model(torch.randn(4, 3, size, size))
    return model.eval()


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


def save_training(
    folder: Path, width: int = 2, classes: int = 3, channels: int = 3, bn_eps: float | None = None, **arguments
) -> str:
    """`NAME=CHECKPOINT` of a small network as timm's train.py writes it; `arguments` are those of its command line."""
    torch.manual_seed(0)
    model = timm.create_model("c4resnet18_fast", num_classes=classes, width=width, in_chans=channels, bn_eps=bn_eps)
    with torch.no_grad():
        model.train()(torch.randn(8, channels, 33, 33))
    always = {"model": "c4resnet18_fast", "model_kwargs": {"width": width}, "bn_eps": bn_eps, "gp": None, "mean": None}
    given = argparse.Namespace(**{**always, **arguments})
    content = {"arch": "c4resnet18_fast", "state_dict": model.state_dict(), "args": given, "epoch": 1}
    torch.save(content, folder / "model_best.pth.tar")
    return f"c4resnet18_fast={folder}/model_best.pth.tar"
