"""A segmentation network on an equivariant backbone: a feature pyramid of regular fields, then an invariant mask.

Every layer commutes with the group, so the mask rotates and reflects with the image. The network is not in timm's
registry: it takes a backbone from there, made with `features_only=True`.
"""

from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.models import FeatureInfo

from equivision_timm.groups import Group
from equivision_timm.layers import ConvNormAct, GroupPool

__all__ = ["EquivariantFPN"]


class PyramidLevel(nn.Module):
    """relu(norm(conv3x3(relu(norm(conv1x1(c)) + up(x))))), up the interpolation to the size of c.

    c [B, in_fields * |G|, h, w] is the backbone's map, x [B, fields * |G|, h', w'] the coarser level, None above the
    coarsest one; the output is [B, fields * |G|, h, w].
    """

    def __init__(self, in_fields: int, fields: int, group: str) -> None:
        super().__init__()
        self.lateral: ConvNormAct = ConvNormAct(in_fields, fields, 1, group)
        self.smooth: ConvNormAct = ConvNormAct(fields, fields, 3, group)

    def forward(self, c: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return self.smooth(self.lateral(c, None if x is None else _resize(x, c)))


class EquivariantFPN(nn.Module):
    """Images [B, in_chans, H, W] -> logits [B, num_classes, H, W] that rotate and reflect with the image.

    A `PyramidLevel` for each level of the backbone, from the coarsest to the finest [B, fields * |G|, h, w]; then the
    maximum over the group, which leaves invariant fields [B, fields, h, w], a 1x1 convolution to the classes, and
    the interpolation to the size of the image.

    The elements of the group that map the pixel grid onto itself are exact at the exact sizes of the backbone
    (`exact_sizes`). Others work, but with random weights the logits of `test_d4resnet` change by .3 of their largest
    value under a quarter turn at 224 pixels, by 1e-6 at 225.

    Args:
        encoder: a model of this package made with `features_only=True`; its `out_indices`, rising, are the levels.
        num_classes: channels of the logits; 1 for a single foreground class, decided by the sign.
        fields: number of fields of the pyramid.

    Raises:
        TypeError: `encoder` is not made with `features_only=True`.
        ValueError: its levels are not all regular fields of one group.

    Source of the architecture: Lin et al., Feature Pyramid Networks for Object Detection (2017).

    Example:
        >>> import timm, equivision_timm
        >>> encoder = timm.create_model("test_c8resnet", features_only=True)
        >>> EquivariantFPN(encoder, num_classes=2)(torch.rand(4, 3, 65, 65)).shape
        torch.Size([4, 2, 65, 65])
    """

    def __init__(self, encoder: nn.Module, num_classes: int, fields: int = 16) -> None:
        super().__init__()
        levels = _levels(encoder)
        self.group: str = levels[0]["group"]
        self.num_classes = num_classes
        self.encoder = encoder
        self.levels: nn.ModuleList = nn.ModuleList(  # coarse to fine
            PyramidLevel(level["num_fields"], fields, self.group) for level in reversed(levels)
        )
        self.group_pool: GroupPool = GroupPool(Group.from_name(self.group).order, "max")
        self.classifier: nn.Conv2d = nn.Conv2d(fields, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.encoder(image)  # fine to coarse
        x: torch.Tensor | None = None
        for index, level in enumerate(self.levels):
            x = level(maps[-1 - index], x)
        logits = self.classifier(self.group_pool(x))  # [B, num_classes, h, w]
        return _resize(logits, image)


@torch.fx.wrap  # depends on whether sizes are odd: one node in a graph of torch.fx
def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x [B, C, h', w'] -> [B, C, h, w] by bilinear interpolation to the size of `like` [B, C', h, w].

    Output pixel i lies at i (h' - 1) / (h - 1) of the input: from border to border, as strides of 2 reduce odd sizes;
    h = 2 h' - 1 takes pixels and means of neighbours. At even sizes, which patches cover, at (i + 1/2) h' / h - 1/2.
    Both place the centre on the centre, and so commute with rotations by 90 degrees and reflections.
    """
    height, width = like.shape[2], like.shape[3]
    borders = bool(height % 2 == 1 and width % 2 == 1)  # a plain bool, also where sizes are symbols
    return F.interpolate(x, [height, width], mode="bilinear", align_corners=borders)


def _levels(encoder: nn.Module) -> list[dict[str, Any]]:
    """timm's description of the maps that `encoder` returns, after a check that a pyramid can stand on them."""
    info = getattr(encoder, "feature_info", None)
    if not isinstance(info, FeatureInfo):
        raise TypeError(f"{type(encoder).__name__} returns no list of maps: create it with features_only=True")
    levels: Any = info.get_dicts()
    groups = [level.get("group", "c1") for level in levels]
    if "c1" in groups or len(set(groups)) > 1:
        raise ValueError(
            f"the levels of the encoder have the groups {groups} ('c1': no symmetry): use an equivariant model without "
            "map_pool, and out_indices of one group"
        )
    return levels
