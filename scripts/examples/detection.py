"""Feature maps in a feature pyramid: a RetinaNet of torchvision on an equivariant backbone learns to find coins.

The maps of the backbone rotate with the image, exactly by multiples of 90 degrees if the sides are 1 mod 32: so the
images have 289 x 193 pixels, and the detector does not resize them. The pyramid and the heads are torchvision's, not
equivariant; ReDet has rotated regions of interest instead.

pip install '.[examples]'
python scripts/examples/detection.py c8reresnet50         # or c8resnet50_fast, or any other backbone of timm
"""

import sys

import timm
import torch
import torch.nn as nn
from coins import coins
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import equivision_timm  # noqa: F401  registers the models

HEIGHT, WIDTH = 289, 193  # both 1 mod 32
PARTS = (0, 191)  # first columns of the two crops


class PyramidBackbone(nn.Module):
    """Images -> {level: map [B, out_channels, h, w]} of three levels, h = (H - 1) / r + 1 for r = 8, 16, 32, so w.

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
    """RetinaNet of two classes, background and coin, with anchor sizes per level; `size_divisible=1` pads nothing."""
    anchors = AnchorGenerator(sizes=((24, 32), (48, 64), (96, 128)), aspect_ratios=((1.0,),) * 3)
    sizes = {"min_size": WIDTH, "max_size": HEIGHT, "size_divisible": 1}
    return RetinaNet(PyramidBackbone(name, **options), num_classes=2, anchor_generator=anchors, **sizes)


def photographs() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Both halves of the photograph, [3, 289, 193], and the boxes and labels of their coins."""
    halves = [coins(slice(14, 14 + HEIGHT), slice(start, start + WIDTH)) for start in PARTS]
    targets = [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)} for _, _, boxes in halves]
    return [image for image, _, _ in halves], targets


def train(model: RetinaNet, steps: int) -> list[float]:
    """Steps on both halves; returns the loss of each."""
    images, targets = photographs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        loss = sum(model.train()(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(name: str) -> None:
    torch.manual_seed(0)
    losses = train(detector(name), steps=20)
    print("  ".join(f"{loss:.2f}" for loss in losses[::4]))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["c8reresnet50"])
