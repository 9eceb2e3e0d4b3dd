"""Orientation networks from a pretrained plain network: s(x)[g] = f(g^-1 x), how upright f finds the image in view g.

f is the first stages of `tf_efficientnet_lite0` on small images. It has seen ImageNet upright, so a few hundred
photographs are enough to train it (configs/orientation.yaml), and the same weights serve every group of rotations.
"""

from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from timm.models import build_model_with_cfg, create_model

from equivision_timm.layers.views import act, shrink
from equivision_timm.models.orientation import Orientation, orientation_variant, standardize
from equivision_timm.models.variants import register_family

__all__ = ["ViewOrientationNet"]

_LEVEL = 3  # the last of the levels of lite0 that is used; its mean over space is projected to the score

for _name in ("act", "shrink", "standardize"):
    torch.fx.wrap(_name)


class ViewOrientationNet(Orientation):
    """Images [B, in_chans, H, W] -> scores [B, |G|], s(h x)[g] = s(x)[h^-1 g]; exact for quarter turns.

    Args:
        group: 'c2', 'c4' or 'c8'.
        size: side of the views, shrunk with antialiasing and masked by the inscribed disc.
        num_classes: |G|, or None.
        drop_rate: dropout before the projection.
        backbone_pretrained: start from timm's weights of lite0, to train the orientation network.
    """

    def __init__(
        self,
        group: str,
        size: int = 64,
        in_chans: int = 3,
        num_classes: int | None = None,
        drop_rate: float = 0.0,
        backbone_pretrained: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, size, in_chans, num_classes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.network: Any = create_model("tf_efficientnet_lite0", backbone_pretrained, in_chans=in_chans, **dd)
        self.network.prune_intermediate_layers([_LEVEL])  # and its head: the network returns maps
        self.num_features: int = self.network.feature_info[_LEVEL]["num_chs"]
        self.dropout: nn.Dropout = nn.Dropout(drop_rate)
        self.score: nn.Linear = nn.Linear(self.num_features, 1, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = standardize(shrink(x, self.size)) / 2  # the scale of images whose mean and std were taken as 0.5
        views = [act(x, g, self.num_classes, inverse=True) for g in range(self.num_classes)]
        x = torch.stack(views, 1).flatten(0, 1)  # [B |G|, C, n, n]
        x = self.network(x.contiguous(memory_format=torch.channels_last))  # faster on CPUs
        return self.score(self.dropout(x.mean((2, 3)))).view(-1, self.num_classes)


VARIANTS = {
    f"{group}orient_lite0": orientation_variant(group, "orient_lite0", "network.conv_stem", license="apache-2.0")
    for group in ("c2", "c4", "c8")
}
register_family(__name__, ViewOrientationNet, partial(build_model_with_cfg, ViewOrientationNet), VARIANTS)
