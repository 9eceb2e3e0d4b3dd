"""A mask that rotates with the image: blood vessels of a retina, by an equivariant network and by a U-Net.

Both learn from the upper half of one photograph of scikit-image, and segment the lower half, which is nearly its mirror
image. The labels come from a classical method, dark ridges narrower than 17 pixels: scores measure how well a network
learns that method, not its agreement with an ophthalmologist. Both networks have 550 thousand parameters; the
equivariant one takes twice the time. Printed are the intersection over union with the labels for the image rotated by
0, 90, 180 and 270 degrees; the smallest of the mask of a rotated image with the rotated mask; and the largest
difference between their logits, relative to the largest logit.

pip install '.[examples]'
python scripts/examples/segment.py
"""

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import skimage
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from equivision_timm import EquivariantFPN

QUARTERS = (0, 1, 2, 3)
RATE = 4e-3  # of 1.5e-3, 4e-3 and 1e-2 the best for the U-Net


def equivariant() -> EquivariantFPN:
    """D4, 550 thousand parameters."""
    encoder = timm.create_model("d4resnet18_fast", width=6, features_only=True)
    return EquivariantFPN(encoder, num_classes=1, fields=8)


def unet() -> smp.Unet:
    """smp's U-Net on a narrow ResNet-18, with as many parameters."""
    widths = {"channels": (12, 24, 48, 96), "decoder_channels": (48, 32, 16, 8, 8)}
    return smp.Unet("tu-resnet18", encoder_weights=None, classes=1, **widths)


@cache
def retina() -> tuple[torch.Tensor, torch.Tensor]:
    """The photograph at half its resolution, [3, 705, 705], normalised; a mask of its vessels [705, 705]."""
    image = skimage.data.retina()[:1410, :1410].reshape(705, 2, 705, 2, 3).mean((1, 3))  # means of 2 x 2 pixels
    smooth = skimage.filters.gaussian(image[..., 1] / 255, 1)
    ridges = skimage.morphology.black_tophat(smooth, skimage.morphology.disk(8)) > 0.04
    eye = skimage.morphology.isotropic_erosion(image.sum(2) > 60, 15)
    mask = skimage.morphology.area_opening(ridges & eye, 80)
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    return (pixels - pixels.mean((1, 2), keepdim=True)) / pixels.std((1, 2), keepdim=True), torch.from_numpy(mask)


def side(model: nn.Module, pixels: int) -> int:
    """Number of pixels along a side: 1 modulo 32 for the equivariant network, an exact size, 0 for the U-Net."""
    return pixels // 32 * 32 + isinstance(model, EquivariantFPN)


def train(model: nn.Module, steps: int, rotate: bool = False, seed: int = 0) -> None:
    """Steps on four crops each of the upper half; with `rotate` in random orientations of the square."""
    image, mask = retina()
    size, generator = side(model, 129), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        images, masks = [], []
        for _ in range(4):
            y, x = generator.integers(352 - size), generator.integers(705 - size)
            both = torch.cat([image, mask[None]])[:, y : y + size, x : x + size]  # [4, size, size]
            if rotate:
                both = both.rot90(generator.integers(4), (1, 2))
                both = both.flip(2) if generator.integers(2) else both
            images.append(both[:3])
            masks.append(both[3:])
        loss = F.binary_cross_entropy_with_logits(model(torch.stack(images)), torch.stack(masks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def predict(model: nn.Module, quarters: int) -> torch.Tensor:
    """Logits of the lower half, rotated by `quarters` times 90 degrees before and back after the network, [H, W]."""
    image, _ = lower_half(model)
    with torch.no_grad():
        logits = model.eval()(image[None].rot90(quarters, (2, 3)))
    return logits.rot90(-quarters, (2, 3))[0, 0]


def lower_half(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The image [3, H, W] and its labels [H, W], of the size that the model takes."""
    image, mask = (x[..., 352:, :] for x in retina())
    height, width = (side(model, n) for n in mask.shape)
    return image[:, :height, :width], mask[:height, :width]


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Intersection over union of two masks."""
    return ((a & b).sum() / (a | b).sum()).item()


def measure(model: nn.Module) -> dict[str, float | list[float]]:
    """'scores': overlap with the labels at each of `QUARTERS`; 'same' and 'error': of the rotated image, see above."""
    _, mask = lower_half(model)
    logits = [predict(model, quarters) for quarters in QUARTERS]
    return {
        "scores": [overlap(x > 0, mask) for x in logits],
        "same": min(overlap(x > 0, logits[0] > 0) for x in logits[1:]),
        "error": max((x - logits[0]).abs().max() / logits[0].abs().max() for x in logits[1:]).item(),
    }


def draw(models: dict[str, nn.Module], path: Path) -> None:
    """A part of the lower half: photograph and labels; the mask of each model, and that of the rotated image."""
    part = slice(0, 224), slice(60, 284)
    pixels, labels = lower_half(next(iter(models.values())))
    low, high = (bound(pixels, (1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    columns = figure.subplots(2, 1 + len(models)).T
    pictures = [("photograph", ((pixels - low) / (high - low)).permute(1, 2, 0)), ("labels", compare(labels, labels))]
    for name, model in models.items():
        _, mask = lower_half(model)
        upright, rotated = (predict(model, quarters) > 0 for quarters in (0, 1))
        pictures.append((f"{name}\noverlap with labels {overlap(upright, mask):.2f}", compare(upright, upright)))
        pictures.append(
            (f"image rotated by 90°\noverlap with above {overlap(upright, rotated):.2f}", compare(upright, rotated))
        )
    for axis, (title, picture) in zip(columns.flat, pictures, strict=True):
        axis.imshow(picture[part].numpy())
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.supxlabel("below: the mask of the rotated image, rotated back; orange: lost, blue: gained", fontsize=10)
    figure.savefig(path, dpi=120)


def compare(upright: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """[H, W, 3]: white in both masks, orange in the first only, blue in the second only."""
    both = torch.stack([upright & rotated, upright & ~rotated, ~upright & rotated], -1).float()
    return both @ torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.2, 0.6, 1.0]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Segment the vessels of a retina.")
    parser.add_argument("--steps", type=int, default=250, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="file to draw the masks to")
    args = parser.parse_args()
    models = {}
    print(f"{'':24}" + "".join(f"{90 * quarters:5}°" for quarters in QUARTERS) + "   same   error of the logits")
    for name, make, rotate in NETWORKS:
        torch.manual_seed(args.seed)
        models[name] = make()
        train(models[name], args.steps, rotate, args.seed)
        found = measure(models[name])
        scores = "".join(f"{score:6.2f}" for score in found["scores"])
        print(f"{name:24}{scores}{found['same']:7.2f}   {found['error']:.0e}", flush=True)
    if args.picture:
        draw(models, args.picture)


NETWORKS = (("U-Net", unet, False), ("U-Net, augmented", unet, True), ("EquivariantFPN", equivariant, False))

if __name__ == "__main__":
    main()
