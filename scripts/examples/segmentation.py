"""An equivariant encoder in segmentation_models.pytorch, by its name `tu-NAME`: a U-Net for coins.

pip install '.[examples]'
python scripts/examples/segmentation.py
"""

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from coins import coins

import equivision_timm  # noqa: F401  registers the models


def unet(name: str, **options) -> smp.Unet:
    """U-Net with one output channel; heights and widths must be divisible by 32, as for any encoder there."""
    return smp.Unet(f"tu-{name}", encoder_weights=None, classes=1, **options)


def train(model: smp.Unet, steps: int) -> list[float]:
    """Train on quarters of the photograph; returns the intersection over union with the mask after each step."""
    image, mask, _ = coins()
    images = torch.stack([image[:, y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128, 256)])
    masks = torch.stack([mask[y : y + 128, x : x + 128] for y in (0, 128) for x in (0, 128, 256)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scores = []
    for _ in range(steps):
        logits = model.train()(images)[:, 0]  # [B, 128, 128]
        loss = F.binary_cross_entropy_with_logits(logits, masks.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        predicted = logits > 0
        scores.append(((predicted & masks).sum() / (predicted | masks).sum()).item())
    return scores


def main() -> None:
    torch.manual_seed(0)
    scores = train(unet("c8resnet18_fast"), steps=20)
    print("intersection over union:", "  ".join(f"{score:.2f}" for score in scores[::4]))


if __name__ == "__main__":
    main()
