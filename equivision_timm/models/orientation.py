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
from timm.models import build_model_with_cfg, create_model

from equivision_timm.groups import Group
from equivision_timm.layers.views import act, shrink
from equivision_timm.models.equivariant_resnet import BasicBlock, EquivariantResNet
from equivision_timm.models.variants import Variant, register_family

__all__ = ["OrientationNet", "ViewOrientationNet", "standardize"]

_WEIGHTS = Path(__file__).parents[1] / "orientation"
_LEVEL = 3  # the last of the levels of lite0 that is used


@torch.fx.wrap
def standardize(x: torch.Tensor) -> torch.Tensor:
    """Each channel of x [B, C, n, n] to mean 0 and variance 1 in the inscribed disc; 0 outside.

    So the scores do not depend on the mean and std of the data config.
    """
    axis = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32) - (x.shape[-1] - 1) / 2
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 <= x.shape[-1] ** 2 / 4).to(x.dtype)  # [n, n]
    count = disc.sum()
    x = (x - (x * disc).sum((2, 3), keepdim=True) / count) * disc
    return x * torch.rsqrt((x * x).sum((2, 3), keepdim=True) / count + 1e-6)


class OrientationNet(nn.Module):
    """Images [B, in_chans, H, W] -> scores [B, |G|], s(h x)[g] = s(x)[h^-1 g].

    The image is shrunk to `size` x `size` pixels with antialiasing, and masked by the inscribed disc. Features
    [B, |G|, C] of the elements follow, the fields of an `EquivariantResNet` averaged over space; each element's are
    projected to its score.

    Args:
        size: 1 modulo 32.
        num_classes: |G|, or None.
        drop_rate: dropout before the projection.
        **options: of the network; `width` is the number of fields of its first stage.
    """

    def __init__(
        self,
        group: str,
        size: int,
        in_chans: int = 3,
        num_classes: int | None = None,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.group: str = group
        self.size: int = size
        self.in_chans: int = in_chans
        self.num_classes: int = Group.from_name(group).order
        if num_classes not in (None, self.num_classes):
            raise ValueError(f"num_classes={num_classes!r}: {group} has {self.num_classes} elements, one class each")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        network, channels = self.create_network(in_chans=in_chans, **options, **dd)
        self.network: nn.Module = network
        self.num_features: int = channels
        self.dropout: nn.Dropout = nn.Dropout(drop_rate)
        self.score: nn.Linear = nn.Linear(channels, 1, bias=False, **dd)

    def create_network(self, **options: Any) -> tuple[nn.Module, int]:
        """The network that `features` uses, and C."""
        network = EquivariantResNet(BasicBlock, (1, 1, 1, 1), self.group, num_classes=0, group_pool="", **options)
        return network, network.num_features // self.num_classes

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, |G|, C] of standardized images [B, in_chans, size, size]."""
        return self.network(x).unflatten(1, (-1, self.num_classes)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.dropout(self.features(standardize(shrink(x, self.size))))).squeeze(2)


class ViewOrientationNet(OrientationNet):
    """Orientation network from a pretrained plain one: s(x)[g] = f(g^-1 x), how upright f finds the image in view g.

    f is the first stages of `tf_efficientnet_lite0`, averaged over space. Its weights have seen ImageNet upright, so a
    few hundred photographs are enough to train it, and the same weights serve every group of rotations: c2, c4 or c8.
    Exact for quarter turns, at any `size`.
    """

    def create_network(self, **options: Any) -> tuple[nn.Module, int]:
        """The first stages, and the channels of the last."""
        network: Any = create_model("tf_efficientnet_lite0", **options)
        network.prune_intermediate_layers([_LEVEL])  # and its head: the network returns maps
        return network, network.feature_info[_LEVEL]["num_chs"]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """See `OrientationNet`."""
        x = x / 2  # the scale of images whose mean and std were taken as 0.5
        views = torch.cat([act(x, g, self.num_classes, inverse=True) for g in range(self.num_classes)])
        maps = self.network(views.contiguous(memory_format=torch.channels_last))  # faster on CPUs
        return maps.mean((2, 3)).unflatten(0, (self.num_classes, -1)).transpose(0, 1)


def _variant(group: str, weights: str, first_conv: str, license: str, **arguments: Any) -> Variant:
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


_FROM_SCRATCH = {
    f"{group}orient_tiny": _variant(group, f"{group}orient_tiny", "network.conv1.conv", "mit", size=65, width=width)
    for group, width in (("c4", 8), ("c8", 6))
}
_FROM_VIEWS = {
    f"{group}orient_lite0": _variant(group, "orient_lite0", "network.conv_stem", "apache-2.0", size=64)
    for group in ("c2", "c4", "c8")
}
for _network, _variants in ((OrientationNet, _FROM_SCRATCH), (ViewOrientationNet, _FROM_VIEWS)):
    register_family(__name__, _network, partial(build_model_with_cfg, _network), _variants)
