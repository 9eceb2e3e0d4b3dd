"""ConvNeXt whose maps are regular fields of a group of the pixel grid: exact at 224, and faster than the plain network.

The architecture is timm's `convnext.py` (Liu et al., arXiv 2201.03545; V2 with global response norm, Woo et al., arXiv
2301.00808), of equal width and depth. Each strided step is a convolution of whole patches, so rotations by 90 degrees
and reflections are exact, to rounding, at sizes that 32 divides, 224 x 224 included; angles in between are not in the
group. The pointwise layers, nearly all of the work, are block diagonal in the irreps basis: under D4 they have 1/8 of
the parameters and 3/16 of the products.

Maps are [B, fields * |G|, H, W] in channels-last format, channel = field * |G| + element.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_ntuple, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.utils.model import reparameterize_model

from equivision_timm.groups import Group
from equivision_timm.kernels import Kernel
from equivision_timm.layers import ElementMajor, GroupPool, InvariantPool, check_pointwise
from equivision_timm.layers.conv import constant_conv, is_watched
from equivision_timm.layers.field_mlp import FieldGRN, FieldLayerNorm, FieldMlp
from equivision_timm.layers.grid_conv import DepthwiseConv2d, MirrorDepthwiseConv2d, PatchConv2d
from equivision_timm.layers.irreps import Device, DType, irreps_matrix, irreps_of
from equivision_timm.layers.tokens import IrrepLinear, IrrepMlp, IrrepNorm, IrrepScale, OnTokens
from equivision_timm.models.backbone import CheckImage, check_classifier, init_weights
from equivision_timm.models.pretrained import build_model
from equivision_timm.models.variants import Variant, digits_cfg, register_family

__all__ = ["EquivariantConvNeXt"]  # the entrypoints are added below


def _dense_mlp(mlp: FieldMlp) -> nn.Module:
    """`mlp` of constant dense matrices: [B, H, W, fields * |G|] -> the same shape."""
    linear = []
    for layer in (mlp.fc1, mlp.fc2):
        dtype = layer.weight.dtype
        weight, bias = (tensor.to(dtype) for tensor in layer.double().dense())
        linear.append(nn.Linear(weight.shape[1], len(weight), device="meta"))
        linear[-1].weight = nn.Parameter(weight, requires_grad=False)
        linear[-1].bias = nn.Parameter(bias, requires_grad=False)
    return nn.Sequential(linear[0], mlp.act, *([mlp.grn] if mlp.grn else []), linear[1])


class BlockMlp(nn.Module):
    """A `FieldMlp` of standard operators, block diagonal, with constant weights: for ONNX and other runtimes.

    Channels are element-major, element * fields + field: [B, H, W, |G| * fields] -> the same shape. A change of basis
    is one product of matrices; a linear layer is a 1x1 convolution in groups. With the plane E, whose rows have two
    blocks, the one-dimensional irreps are joined in pairs, so that all groups are of one size.
    """

    def __init__(self, mlp: FieldMlp) -> None:
        super().__init__()
        basis = irreps_matrix(mlp.fc1.group, mlp.fc1.weight.dtype, mlp.fc1.weight.device)
        self.order: int = basis.shape[0]
        self.basis: nn.Parameter = nn.Parameter(basis.clone(), requires_grad=False)  # Q
        self.fc1: nn.Conv2d = _grouped_conv(mlp.fc1)
        self.act: nn.Module = mlp.act
        self.grn: FieldGRN | None = mlp.grn
        self.fc2: nn.Conv2d = _grouped_conv(mlp.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        B, C, H, W = x.shape
        x = self.basis @ x.reshape(B, self.order, C // self.order * H * W)  # f^ = Q f
        x = self.fc1(x.reshape(B, C, H, W))
        hidden = x.shape[1]
        x = self.basis.t() @ x.reshape(B, self.order, hidden // self.order * H * W)  # f = Q^T f^
        x = self.act(x)
        if self.grn is not None:
            x = x.reshape(B, self.order, hidden // self.order, H, W).permute(1, 0, 3, 4, 2)  # [|G|, B, H, W, fields]
            x = self.grn.on_elements(x).permute(1, 0, 4, 2, 3)
        x = self.basis @ x.reshape(B, self.order, hidden // self.order * H * W)
        x = self.fc2(x.reshape(B, hidden, H, W))
        x = self.basis.t() @ x.reshape(B, self.order, C // self.order * H * W)
        return x.reshape(B, C, H, W).permute(0, 2, 3, 1)


def _grouped_conv(layer: IrrepLinear) -> nn.Conv2d:
    ones, plane = list(layer.weight), layer.plane_matrices()
    if plane is not None:
        plane = plane.transpose(1, 2).flatten(2).flatten(0, 1)  # [2 * out, 2 * in]
        ones = [torch.block_diag(a, b) for a, b in zip(ones[::2], ones[1::2], strict=True)]
        ones += [plane] * layer.multiplicity
    weight = torch.cat(ones)[..., None, None].contiguous()  # [|G| * out, in or 2 * in, 1, 1]
    return constant_conv(weight, F.pad(layer.bias, [0, len(weight) - layer.out_fields]), len(ones))


class EquivariantConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, MLP, LayerScale, stochastic depth, shortcut: [B, fields * |G|, H, W] -> the same."""

    def __init__(
        self,
        fields: int,
        group: str,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        conv_bias: bool = True,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.order: int = irreps_of(group).order
        self.ls_init_value = ls_init_value
        self.conv_dw: DepthwiseConv2d = DepthwiseConv2d(fields, kernel_size, group, conv_bias, **dd)
        self.norm: FieldLayerNorm = FieldLayerNorm(fields, self.order, norm_eps, **dd)
        self.mlp: FieldMlp = FieldMlp(fields, int(mlp_ratio * fields), group, act_layer, use_grn, **dd)
        self.gamma: nn.Parameter | None = None
        if ls_init_value is not None:
            self.gamma = nn.Parameter(torch.empty(fields, **dd))
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set LayerScale to its initial value."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.ls_init_value or 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv_dw(x)).permute(0, 2, 3, 1)
        y = self.mlp(y).permute(0, 3, 1, 2)
        if self.gamma is None:
            return x + self.drop_path(y)
        scale = self.gamma.repeat_interleave(self.order)[:, None, None].expand(x.shape[0], -1, 1, 1)
        return torch.addcmul(x, y, self.drop_path(scale))  # scale 0 where stochastic depth drops the block

    @torch.no_grad()
    def fold(self, form: str) -> None:
        """Make its weights constants, LayerScale part of those of the last linear layer; `form` as of the stage."""
        conv, element_major = self.conv_dw.dense_conv(), form == "blocks"
        if element_major:  # [fields * |G|, ...] -> [|G| * fields, ...]
            for parameter in conv.parameters():
                parameter.data = parameter.unflatten(0, (-1, self.order)).transpose(0, 1).flatten(0, 1)
        self.add_module("conv_dw", conv if element_major else conv.to(memory_format=torch.channels_last))
        if self.gamma is not None:
            self.mlp.fc2.scale_rows(self.gamma)
            self.gamma = None
        self.add_module("norm", self.norm.plain(element_major))
        if form != "native":
            self.add_module("mlp", BlockMlp(self.mlp) if element_major else _dense_mlp(self.mlp))


class MirrorBlock(nn.Module):
    """The block of flopping-for-flops, of group d1, in the irreps basis: tokens [B, H, W, 2 * fields] -> the same."""

    def __init__(
        self,
        fields: int,
        group: str,
        kernel_size: int,
        conv_bias: bool,
        ls_init_value: float | None,
        act_layer: Callable[..., nn.Module],
        norm_eps: float,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv_dw: MirrorDepthwiseConv2d = MirrorDepthwiseConv2d(fields, kernel_size, conv_bias, **dd)
        self.norm: IrrepNorm = IrrepNorm(fields, group, norm_eps, **dd)
        self.mlp: IrrepMlp = IrrepMlp(fields, 4 * fields, group, act_layer, **dd)
        scale = ls_init_value is not None
        self.ls: nn.Module = IrrepScale(fields, group, ls_init_value or 0.0, **dd) if scale else nn.Identity()
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.ls(self.mlp(self.norm(y))))


class EquivariantConvNeXtStage(nn.Module):
    """Norm and 2 x 2 patches if `downsample`, then the blocks: [B, in_fields * |G|, H, W] -> [B, fields * |G|, ...]."""

    def __init__(
        self,
        in_fields: int,
        fields: int,
        group: str,
        downsample: bool,
        drop_path_rates: Sequence[float],
        conv_bias: bool = True,
        norm_eps: float = 1e-6,
        mirror: bool = False,
        device: Device = None,
        dtype: DType = None,
        **block: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing: bool = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            channels = in_fields * irreps_of(group).order
            self.downsample = nn.Sequential(
                _norm(in_fields, group, norm_eps, mirror, **dd),
                PatchConv2d(channels, fields, 2, group, True, conv_bias, **dd),
            )
        shared: dict[str, Any] = dict(conv_bias=conv_bias, norm_eps=norm_eps, **block, **dd)
        make = MirrorBlock if mirror else EquivariantConvNeXtBlock
        blocks = [make(fields, group, drop_path=rate, **shared) for rate in drop_path_rates]
        self.blocks: nn.Sequential = nn.Sequential(*[OnTokens(b, group) if mirror else b for b in blocks])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The stage with constant weights, in standard operators; called by timm's `reparameterize_model`."""
        return self.fold("blocks")

    @torch.jit.unused
    def fold(self, form: str) -> nn.Module:
        """The stage with constant weights, in place; as it is if anything in it has hooks or was replaced.

        Args:
            form: 'native', the layers as they are; 'dense', of plain matrices; 'blocks', block diagonal, standard.
        """
        blocks: list[Any] = list(self.blocks.children())
        if not all(map(_is_unchanged, blocks)) or any(map(is_watched, self.modules())):
            return self
        reparameterize_model(self.downsample, inplace=True)
        for block in blocks:
            block.fold(form)
        self.grad_checkpointing = False
        if form == "blocks":
            self.add_module("blocks", ElementMajor(self.blocks, blocks[0].order))
        return self


def _norm(fields: int, group: str, eps: float, mirror: bool, **dd: Any) -> nn.Module:
    """The norm of regular fields [B, fields * |G|, H, W]."""
    if mirror:
        return OnTokens(IrrepNorm(fields, group, eps, **dd), group)
    return FieldLayerNorm(fields, irreps_of(group).order, eps, **dd)


def _is_unchanged(block: Any) -> bool:
    """Whether nobody replaced a module with weights in the block, nor fused it."""
    if type(block) is not EquivariantConvNeXtBlock or type(block.mlp) is not FieldMlp:
        return False
    parts = (block.conv_dw, block.norm, block.mlp.fc1, block.mlp.fc2)
    return [type(part) for part in parts] == [DepthwiseConv2d, FieldLayerNorm, IrrepLinear, IrrepLinear]


class InvariantHead(nn.Module):
    """Pooling over space and group, norm, dropout, classifier: [B, fields * |G|, H, W] -> [B, num_classes]."""

    def __init__(
        self,
        fields: int,
        num_classes: int,
        pool_type: str,
        order: int,
        group_pool: str,
        drop_rate: float,
        norm_eps: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.in_features: int = fields * (1 if group_pool else order)
        self.global_pool: InvariantPool = InvariantPool(pool_type, order, group_pool)
        self.norm: nn.Module = nn.LayerNorm(self.in_features, eps=norm_eps, **dd)
        self.drop: nn.Dropout = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None) -> None:
        """Replace the classifier, and the pooling over space unless `pool_type` is None."""
        if pool_type is not None:
            group_pool = self.global_pool.group_pool
            self.global_pool = InvariantPool(pool_type, group_pool.order, group_pool.pool_type)
        like = next(self.norm.parameters(), torch.empty(0))
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.in_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        is_map = not self.global_pool.pool_type  # the norm is over channels
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if is_map else self.norm(x)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class EquivariantConvNeXt(nn.Module):
    """ConvNeXt on regular fields: images [B, in_chans, H, W] -> logits [B, num_classes], unchanged by the group.

    `forward_features` returns the map [B, num_features, H / 32, W / 32], regular fields, field-major. Not available:
    timm's `conv_mlp` (a way to compute), `norm_layer`, `head_norm_first`, `head_hidden_size`; `stem_type` (overlapping
    stems) and `output_stride`, whose even kernels and paddings no size keeps equivariant beside whole patches.

    Args: as of timm's ConvNeXt, but for
        group: name of the group: 'd4', 'd1', 'c4', or another one that maps the pixel grid onto itself.
        global_pool: over space, 'avg', 'max', 'avgmax', or '' for the map.
        group_pool: over the group, after that over space: 'max' or 'avg'; '' keeps the group axis, NOT invariant.
        map_pool: 'max' or 'avg' for invariant maps of one channel a field, with num_classes=0; '' for regular fields.
        dims: multiples of |G|.
        mirror: whether norms, LayerScale and depthwise filters act on the irreps of d1, as in flopping-for-flops;
            without GRN, with group_pool='avg'.
        act_layer: must be pointwise.

    Raises:
        ValueError: a value of a keyword that does not exist, does not fit the others, or would break the symmetry.
    """

    def __init__(
        self,
        group: str = "d4",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        group_pool: str = "max",
        map_pool: str = "",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: int | Sequence[int] = 7,
        ls_init_value: float | None = 1e-6,
        patch_size: int = 4,
        head_init_scale: float = 1.0,
        conv_bias: bool = True,
        use_grn: bool = False,
        mirror: bool = False,
        act_layer: str | Callable[..., nn.Module] = "gelu",
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        order = irreps_of(group).order
        if any(dim % order for dim in dims):
            raise ValueError(f"dims {list(dims)} must be multiples of {order}, the order of {group}")
        check_classifier(num_classes, global_pool, map_pool)
        if mirror and (group, group_pool, use_grn) != ("d1", "avg", False):
            raise ValueError(f"mirror=True with {group!r}, {group_pool!r}: needs 'd1', group_pool='avg' and no GRN")
        fields = [dim // order for dim in dims]
        self.group = group
        self.num_classes: int = num_classes
        self.in_chans = in_chans
        self.head_init_scale = head_init_scale
        self.check_image: CheckImage = CheckImage(in_chans)
        self.stem: nn.Sequential = nn.Sequential(
            PatchConv2d(in_chans, fields[0], patch_size, group, False, conv_bias, **dd),
            _norm(fields[0], group, norm_eps, mirror, **dd),
        )
        shared: dict[str, Any] = dict(conv_bias=conv_bias, mirror=mirror, ls_init_value=ls_init_value, **dd)
        if use_grn:
            shared["use_grn"] = True
        shared.update(act_layer=check_pointwise(act_layer), norm_eps=norm_eps)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        self.stages: nn.Sequential = nn.Sequential(
            *[
                EquivariantConvNeXtStage(before, m, group, bool(i), rate, kernel_size=kernel, **shared)
                for i, (before, m, rate, kernel) in enumerate(
                    zip([fields[0], *fields], fields, rates, to_ntuple(len(fields))(kernel_sizes), strict=False)
                )
            ]
        )
        channels, of = (1, "c1") if map_pool else (order, group)
        self.feature_info: Sequence[dict[str, Any]] = [  # a list, but torch.jit warns if the annotation says so
            dict(module=f"stages.{i}", num_chs=m * channels, reduction=patch_size * 2**i, num_fields=m, group=of)
            for i, m in enumerate(fields)
        ]
        self.norm_pre: nn.Module = nn.Identity()  # timm's models have one here
        self.map_pool: GroupPool = GroupPool(order, map_pool)
        self.num_features: int = fields[-1] * channels
        self.head: InvariantHead = InvariantHead(
            fields[-1], num_classes, global_pool, channels, group_pool, drop_rate, norm_eps, **dd
        )
        self.head_hidden_size: int = self.head.in_features
        self.init_weights()

    @torch.jit.unused
    def init_weights(self) -> None:
        """Initialise all weights, also of a model that comes from the meta device."""
        init_weights(self)
        for module in self.modules():  # after the linear layers inside
            if isinstance(module, FieldMlp):
                module.reset_parameters()
        with torch.no_grad():
            for parameter in self.head.fc.parameters():
                parameter.mul_(self.head_init_scale)

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, as timm's ConvNeXt has them."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, EquivariantConvNeXtStage):
                module.grad_checkpointing = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The linear classifier on invariant features."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling over space unless `global_pool` is None; 0 classes: none."""
        check_classifier(num_classes, global_pool, self.map_pool.pool_type)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    @property
    def is_invariant(self) -> bool:
        """Whether the group leaves the logits unchanged."""
        return bool(self.head.global_pool.group_pool.pool_type or self.map_pool.pool_type)

    @torch.jit.unused
    def kernels(self) -> set[Kernel]:
        """Kernel bases of the coefficients: none."""
        return set()

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether an image of this size, n or (height, width), may be rotated and reflected without any resampling."""
        height, width = (size, size) if isinstance(size, int) else size
        sides = Group.from_name(self.group).reversed_sides(height, width)
        return all(side % self._reduction() == 0 for side in sides)

    @torch.jit.unused
    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """The exact sizes next to `near`: the largest that is not above, the smallest not below."""
        step = self._reduction()
        return max(1, near // step) * step, max(1, -(-near // step)) * step

    def _reduction(self) -> int:
        return max(level["reduction"] for level in self.feature_info)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The map of the last stage, [B, num_features, H / 32, W / 32]; pooled over the group with `map_pool`."""
        return self.map_pool(self.norm_pre(self.stages(self.stem(self.check_image(x)))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the map over space, then over the group; classify unless `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps of the stages; arguments as of timm's ConvNeXt (`norm` has no effect: there is no last norm)."""
        if output_fmt != "NCHW":
            raise ValueError(f"unknown output_fmt {output_fmt}: use NCHW")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(self.check_image(x))
        for index, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take_indices:
                maps.append(self.map_pool(x))
        return maps if intermediates_only else (self.map_pool(x), maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head; returns the indices that remain."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        removed = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or removed:
            self.head.norm = nn.Identity()
            self.head_hidden_size = self.num_features // self.head.global_pool.group_pool.order
            self.reset_classifier(0, "")
        return take_indices


WIDTHS = {  # depths, dims, as in timm
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
SYMMETRY = {
    "d4": "rotations by 90 degrees and reflections",
    "c4": "rotations by 90 degrees",
    "d1": "left-right reflection",
}
CFG: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.0",
    "classifier": "head.fc",
    "license": "mit",
}


def _row(size: str, group: str = "d4", version: int = 1) -> Variant:
    depths, dims = WIDTHS[size]
    arguments: dict[str, Any] = {"group": group, "depths": depths, "dims": dims}
    if version == 2:
        arguments.update(use_grn=True, ls_init_value=None)
    text = f"{group.upper()} ConvNeXt{'V2' if version == 2 else ''} {size}: logits invariant under {SYMMETRY[group]}."
    return Variant(text, arguments, CFG)


VARIANTS: dict[str, Variant] = {
    **{f"d4convnext_{size}": _row(size) for size in WIDTHS},
    **{f"d4convnextv2_{size}": _row(size, version=2) for size in ("atto", "nano", "tiny", "base")},
    "c4convnext_tiny": _row("tiny", "c4"),
    **{f"d1convnext_{size}": _row(size, "d1") for size in ("tiny", "small", "base")},
    "test_d4convnext": Variant(
        f"Tiny D4 ConvNeXt for tests: logits invariant under {SYMMETRY['d4']}.",
        {"group": "d4", "depths": (1, 1, 2, 1), "dims": (32, 64, 128, 192), "ls_init_value": None},
        {**CFG, **digits_cfg("test_d4convnext", 64), "pool_size": (2, 2)},
        "digits",
    ),
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `name` through timm; see `EquivariantConvNeXt` for the keywords, all of which may be overridden."""
    features = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": FeatureGetterNet}
    return build_model(EquivariantConvNeXt, name, pretrained, feature_cfg=features, **kwargs)


register_family(__name__, EquivariantConvNeXt, _create, VARIANTS)
