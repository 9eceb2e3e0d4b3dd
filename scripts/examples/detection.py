"""Feature maps in a feature pyramid: a RetinaNet of torchvision on an equivariant backbone learns to find coins.

pip install 'equivision-timm[examples]'
python scripts/examples/detection.py
"""

import timm
import torch
import torch.nn as nn
from coins import coins
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import equivision_timm  # noqa: F401  registers the models


class PyramidBackbone(nn.Module):
    """Images -> {level: map [B, out_channels, H / reduction, W / reduction]} of three levels, 8 to 32.

    Args:
        name: a model of timm.
        out_channels: channels of every level of the pyramid.
        options: for `timm.create_model`, such as `pretrained=True`.
    """

    def __init__(self, name: str, out_channels: int = 64, **options) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4), **options)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): features for level, features in enumerate(self.body(x))})


def detector(name: str, **options) -> RetinaNet:
    """RetinaNet of two classes, background and coin, with an anchor size per level."""
    anchors = AnchorGenerator(sizes=((24, 32), (48, 64), (96, 128)), aspect_ratios=((1.0,),) * 3)
    backbone = PyramidBackbone(name, **options)
    return RetinaNet(backbone, num_classes=2, anchor_generator=anchors, min_size=288, max_size=384)


def train(model: RetinaNet, steps: int) -> list[float]:
    """Steps on the one image; returns the loss of each."""
    image, _, boxes = coins()
    target = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        loss = sum(model.train()([image], [target]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    losses = train(detector("c4resnet18_fast"), steps=20)
    print("  ".join(f"{loss:.2f}" for loss in losses[::4]))


if __name__ == "__main__":
    main()
