"""Orientation networks: one score for each rotation of a group, which permute when the image rotates.

They choose the view of a `Canonicalized` model; configs/orientation.yaml is the recipe of their training. The weights
in the package were trained on the photographs that equivision_timm/orientation/README.md lists.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from timm.models import build_model_with_cfg

from equivision_timm.groups import Group
from equivision_timm.layers.views import shrink
from equivision_timm.models.equivariant_resnet import BasicBlock, EquivariantResNet
from equivision_timm.models.variants import Variant, register_family

__all__ = ["Orientation", "OrientationNet", "orientation_variant", "standardize"]

_WEIGHTS = Path(__file__).parents[1] / "orientation"
torch.fx.wrap("shrink")
torch.fx.wrap("standardize")


def standardize(x: torch.Tensor) -> torch.Tensor:
    """Each channel of x [B, C, n, n] to mean 0 and variance 1 in the inscribed disc; 0 outside.

    So the scores do not depend on the mean and std of the data config.
    """
    axis = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32) - (x.shape[-1] - 1) / 2
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 <= x.shape[-1] ** 2 / 4).to(x.dtype)  # [n, n]
    count = disc.sum()
    x = (x - (x * disc).sum((2, 3), keepdim=True) / count) * disc
    return x * torch.rsqrt((x * x).sum((2, 3), keepdim=True) / count + 1e-6)


class Orientation(nn.Module):
    """What a `Canonicalized` model asks of its orientation network: the group, and a class for each element."""

    def __init__(self, group: str, size: int, in_chans: int, num_classes: int | None) -> None:
        super().__init__()
        self.group: str = group
        self.size: int = size
        self.in_chans: int = in_chans
        self.num_classes: int = Group.from_name(group).order
        if num_classes not in (None, self.num_classes):
            raise ValueError(f"num_classes={num_classes!r}: {group} has {self.num_classes} elements, one class each")


class OrientationNet(Orientation):
    """Images [B, in_chans, H, W] -> scores [B, |G|], s(h x)[g] = s(x)[h^-1 g].

    The image is shrunk to `size` x `size` pixels with antialiasing, and masked by the inscribed disc; an
    `EquivariantResNet` follows, whose fields are averaged over space and projected to one regular field, the scores.

    Args:
        width: fields of the first stage; the others have 2, 4 and 8 times as many.
        size: side of the shrunk image, 1 modulo 32.
        num_classes: |G|, or None.
        drop_rate: dropout before the projection.
        **options: of the `EquivariantResNet`.
    """

    def __init__(
        self,
        group: str,
        width: int,
        size: int = 65,
        in_chans: int = 3,
        num_classes: int | None = None,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(group, size, in_chans, num_classes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.network: EquivariantResNet = EquivariantResNet(
            BasicBlock, (1, 1, 1, 1), group, width, num_classes=0, in_chans=in_chans, group_pool="", **options, **dd
        )
        self.num_features: int = self.network.num_features
        self.dropout: nn.Dropout = nn.Dropout(drop_rate)
        self.score: nn.Linear = nn.Linear(self.num_features // self.num_classes, 1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.network(standardize(shrink(x, self.size)))
        fields = x.unflatten(1, (-1, self.num_classes)).transpose(1, 2)  # [B, |G|, fields]
        return self.score(self.dropout(fields)).squeeze(2)


def orientation_variant(group: str, weights: str, first_conv: str, license: str = "mit", **arguments: Any) -> Variant:
    """The row of an orientation network of a group, with the file of its weights in the package."""
    order = Group.from_name(group).order
    cfg = dict(
        file=str(_WEIGHTS / f"{weights}.safetensors"),
        num_classes=order,
        input_size=(3, 129, 129),
        crop_pct=1.0,
        first_conv=first_conv,
        classifier="score",
        license=license,
        description="upright photographs rotated by any angle; the class is the nearest element of the group",
    )
    summary = f"Which of {order} rotations the image has: the scores of a Canonicalized model"
    return Variant(summary, {"group": group, **arguments}, cfg, "photographs")


VARIANTS = {
    f"{group}orient_tiny": orientation_variant(group, f"{group}orient_tiny", "network.conv1.conv", width=width)
    for group, width in (("c4", 8), ("c8", 6))
}
register_family(__name__, OrientationNet, partial(build_model_with_cfg, OrientationNet), VARIANTS)
