"""Equivariant ResNets: residual networks whose features turn and mirror with the image.

The network is the one of equivision (Klee, https://github.com/dmklee/equivision): a ResNet of steerable convolutions
on regular fields; after the spatial pooling the maximum over the group makes the logits invariant. Every feature map
is a plain tensor [B, fields * |G|, H, W], field-major (channel = field * |G| + element).

Quarter turns and mirrors in the group are exact where every stride-2 layer sees an odd size: images of n x n pixels
with n = 1 mod 32 (225, 257, ...). Turns by 45 degrees are approximate: the pixel grid resamples.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_norm_layer
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices

from equivision_timm.groups import Group
from equivision_timm.layers import (
    CheckImage,
    ConvNorm,
    GroupPool,
    InvariantPool,
    MaxPool2d,
    SteerableConv2d,
    check_pointwise,
    check_positionwise,
    fuses,
)
from equivision_timm.models.pretrained import TAG, WEIGHTS_FILE, build_pretrained, hub_id

__all__ = ["BasicBlock", "Bottleneck", "EquivariantResNet"]  # register_model adds every entrypoint


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, in_fields * |G|, H, W] -> [B, fields * |G|, H / stride, W / stride].

    Args:
        in_fields: number of input fields.
        fields: number of output fields.
        group: name of the group.
        stride: stride of the first convolution and of the shortcut.
        dilation: dilation of the second convolution.
        first_dilation: dilation of the first convolution.
        act_layer: pointwise activation.
        norm_layer: normalisation wrapped by `FieldNorm`.
        drop_path: probability of dropping the residual branch of a sample in training.
        device: where to create the parameters.
        dtype: their type.
    """

    expansion = 1

    def __init__(
        self,
        in_fields: int,
        fields: int,
        group: str,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        conv = partial(ConvNorm, group=group, norm_layer=norm_layer, device=device, dtype=dtype)
        self.conv1 = conv(in_fields, fields, 3, stride=stride, dilation=first_dilation)
        self.act1 = act_layer()
        self.conv2 = conv(fields, fields, 3, dilation=dilation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = nn.Identity()
        if stride != 1 or in_fields != fields:
            self.downsample = conv(in_fields, fields, 1, stride=stride)
        self.act2 = act_layer(inplace=True)

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.conv2.norm.per_field.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        if not torch.jit.is_scripting() and self._fuses(x):
            return self._infer(x, shortcut)
        x = self.act1(self.conv1(x))
        x = self.drop_path(self.conv2(x))
        return self.act2(x + shortcut)

    @torch.jit.unused
    def _fuses(self, x: torch.Tensor) -> bool:
        return fuses(x, (self.conv1, self.conv2), (self.act1, self.act2), self.drop_path)

    @torch.jit.unused
    def _infer(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """The rest of `forward` where it `_fuses`: one pass for each convolution, its shortcut and its ReLU."""
        x = self.conv1.infer(x, relu=True)
        return self.conv2.infer(x, shortcut, relu=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; arguments as in `BasicBlock`, four times `fields` at the output."""

    expansion = 4

    def __init__(
        self,
        in_fields: int,
        fields: int,
        group: str,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        conv = partial(ConvNorm, group=group, norm_layer=norm_layer, device=device, dtype=dtype)
        out_fields = fields * self.expansion
        self.conv1 = conv(in_fields, fields, 1)
        self.act1 = act_layer()
        self.conv2 = conv(fields, fields, 3, stride=stride, dilation=first_dilation)
        self.act2 = act_layer()
        self.conv3 = conv(fields, out_fields, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = nn.Identity()
        if stride != 1 or in_fields != out_fields:
            self.downsample = conv(in_fields, out_fields, 1, stride=stride)
        self.act3 = act_layer(inplace=True)

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.conv3.norm.per_field.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        if not torch.jit.is_scripting() and self._fuses(x):
            return self._infer(x, shortcut)
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        x = self.drop_path(self.conv3(x))
        return self.act3(x + shortcut)

    @torch.jit.unused
    def _fuses(self, x: torch.Tensor) -> bool:
        return fuses(x, (self.conv1, self.conv2, self.conv3), (self.act1, self.act2, self.act3), self.drop_path)

    @torch.jit.unused
    def _infer(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """As in `BasicBlock`."""
        x = self.conv1.infer(x, relu=True)
        x = self.conv2.infer(x, relu=True)
        return self.conv3.infer(x, shortcut, relu=True)


class EquivariantResNet(nn.Module):
    """ResNet on regular fields: images [B, in_chans, H, W] -> logits [B, num_classes] that the group leaves unchanged.

    `forward_features` returns the equivariant map [B, num_features, H / 32, W / 32], num_features = fields * |G|.
    With `num_classes=0, global_pool=''` the model itself returns a map: the equivariant one for `group_pool=''`, the
    invariant one [B, fields, H / 32, W / 32] (one channel per field) for `group_pool='max'` or 'avg'.

    With `map_pool='max'` or 'avg' every map that leaves the model is invariant, one channel per field: that of
    `forward_features`, those of `forward_intermediates` and `features_only`. It is for heads that know nothing of the
    group. `num_features`, `feature_info` and `head_hidden_size` then count fields, and `forward` pools this map over
    space. A classifier is refused: pooling over the group and over space do not commute, so its input would not be what
    the pretrained classifiers were trained on.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        group: name of the group: 'c1', 'd1', 'c4', 'd4', 'c8' or 'd8'.
        width: fields of the stem and of the first stage; the stages have 1, 2, 4 and 8 times as many.
        num_classes: number of classes; 0 removes the classifier.
        in_chans: number of image channels.
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        global_pool: timm's pooling over space: 'avg', 'max', 'avgmax', 'catavgmax', or '' to keep the map.
        group_pool: pooling over the group, after the pooling over space: 'max', 'avg', or '' to keep the group axis
            (the logits then depend on the orientation).
        map_pool: pooling of all maps over the group, 'max' or 'avg'; '' keeps them equivariant.
        act_layer: activation, a name timm knows or a class; must be pointwise.
        norm_layer: normalisation, a name timm knows or a class; applied per field.
        bn_momentum: momentum of the batch norms, PyTorch's 0.1 where None.
        bn_eps: epsilon of the batch norms, PyTorch's 1e-5 where None.
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth, rising linearly from 0 to this rate at the last block.
        zero_init_last: start every residual branch at zero (last norm weight 0); the original network does not.
        conv_strategy: how to compute the convolutions, see `set_conv_strategy`; the output does not depend on it.
        device: where to create parameters and buffers.
        dtype: their type.

    Raises:
        ValueError: a group without frozen bases, an `output_stride`, `group_pool`, `act_layer` or `norm_layer` that
            does not exist or would break equivariance; a classifier without global pooling, or with `map_pool`.
    """

    __jit_unused_properties__ = ("group_pool",)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        group: str,
        width: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        group_pool: str = "max",
        map_pool: str = "",
        act_layer: str | Callable[..., nn.Module] = nn.ReLU,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        conv_strategy: str | dict[str, str] = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {output_stride!r} does not exist: use 8, 16 or 32")
        if map_pool not in ("max", "avg", ""):
            raise ValueError(f"unknown map_pool {map_pool!r}: use 'max', 'avg', or '' for equivariant maps")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.group = group
        order = Group.from_name(group).order
        act_layer = check_pointwise(act_layer)
        norm_layer = _batch_norm_options(get_norm_layer(norm_layer), momentum=bn_momentum, eps=bn_eps)
        check_positionwise(norm_layer, width)

        # Stem: trivial fields (the image) -> regular fields
        self.check_image = CheckImage(in_chans)
        self.conv1 = ConvNorm(in_chans, width, 7, group, "trivial", stride=2, norm_layer=norm_layer, **dd)
        self.act1 = act_layer()
        map_group = "c1" if map_pool else group  # pooled over the group, a field is one channel that nothing permutes
        self.feature_info = [_feature_info(width, map_group, reduction=2, module="act1")]
        self.maxpool = MaxPool2d(kernel_size=3, stride=2, padding=1)

        # Stages
        drop_rates = [drop_path_rate * index / max(1, sum(layers) - 1) for index in range(sum(layers))]
        in_fields, reduction, dilation = width, 4, 1
        for stage, depth in enumerate(layers):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation
            if reduction * stride > output_stride:  # dilate instead of striding, from this stage's second 3x3 on
                stride, dilation = 1, dilation * stride
            reduction *= stride
            blocks = []
            for index in range(depth):
                blocks.append(
                    block(
                        in_fields,
                        width * 2**stage,
                        group,
                        stride=stride if index == 0 else 1,
                        dilation=dilation,
                        first_dilation=first_dilation if index == 0 else dilation,
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        drop_path=drop_rates.pop(0),
                        **dd,
                    )
                )
                in_fields = width * 2**stage * block.expansion
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append(_feature_info(in_fields, map_group, reduction, module=name))

        # Head: pool over space, then over the group (the two do not commute), then classify
        self.map_pool = GroupPool(order, map_pool)
        self.num_features = self.feature_info[-1]["num_chs"]
        self._check_classifier(num_classes, global_pool)
        self.global_pool = self._create_global_pool(global_pool, group_pool)
        self._create_classifier(**dd)

        self.set_conv_strategy(conv_strategy)
        if zero_init_last:
            self._zero_init_last()

    @torch.jit.ignore
    def set_conv_strategy(self, strategy: str | dict[str, str]) -> None:
        """How to compute the convolutions: faster or slower, with the same output but for float noise.

        Args:
            strategy: 'auto' (by estimate, for each layer and input size), 'expand', 'block_diagonal' or 'native', for
                all convolutions of regular fields (the stem, whose input is an image, always expands); or a mapping
                from names of layers to these, as `conv_strategies` returns it, which leaves other layers as they are.

        Raises:
            ValueError: an unknown strategy or layer, or one that cannot run there. Then nothing is changed.
        """
        layers = {name: m for name, m in self.named_modules() if isinstance(m, SteerableConv2d)}
        if isinstance(strategy, str):
            strategy = {name: strategy for name, layer in layers.items() if layer.input_type == "regular"}
        unknown = [name for name in strategy if name not in layers]
        if unknown:
            raise ValueError(
                f"conv_strategy names {unknown[0]!r}, which is no convolution of this model: see conv_strategies()"
            )
        for name, value in strategy.items():
            layers[name].check_strategy(value)
        for name, value in strategy.items():
            layers[name].strategy = value

    @torch.jit.ignore
    def conv_strategies(self, size: int = 224, batch_size: int = 8) -> dict[str, str]:
        """The strategy that each convolution takes for `batch_size` images of size x size pixels: {layer: strategy}."""
        device = next(self.parameters()).device
        shapes = self.conv_input_shapes(size)
        return {
            name: self.get_submodule(name).strategy_for((batch_size, *shape[1:]), device)
            for name, shape in shapes.items()
        }

    @torch.jit.ignore
    def conv_input_shapes(self, size: int = 224) -> dict[str, torch.Size]:
        """The input [1, C, H, W] of each convolution for an image of size x size pixels: {layer: shape}."""
        shapes: dict[str, torch.Size] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape}))
            for name, layer in self.named_modules()
            if isinstance(layer, SteerableConv2d)
        ]
        was_training = self.training
        try:
            with torch.no_grad():
                self.eval().forward_features(next(self.parameters()).new_zeros(1, self.in_chans, size, size))
        finally:
            self.train(was_training)
            for hook in hooks:
                hook.remove()
        return shapes

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draw all weights anew and refill the constant buffers, for a model that came from the meta device, say."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if zero_init_last:
            self._zero_init_last()

    def _zero_init_last(self) -> None:
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.zero_init_last()

    @property
    def group_pool(self) -> GroupPool:
        """The pooling over the group, behind that over space."""
        return self.global_pool.group_pool

    def _check_classifier(self, num_classes: int, pool_type: str | None) -> None:
        """Raises ValueError where `num_classes` are to be told apart on a map."""
        if num_classes > 0 and pool_type == "":
            raise ValueError(
                f"global_pool {pool_type!r} keeps the map, which a classifier of {num_classes} classes cannot take: "
                "use num_classes=0, or global_pool='avg'"
            )
        if num_classes > 0 and self.map_pool.pool_type:
            raise ValueError(
                f"map_pool {self.map_pool.pool_type!r} is for maps, but the model is to have a classifier of "
                f"{num_classes} classes: use num_classes=0, or map_pool=''"
            )

    def _create_global_pool(self, pool_type: str, group_pool: str) -> InvariantPool:
        """The pooling in front of the classifier; behind `map_pool` the group has no axis left."""
        return InvariantPool(pool_type, 1 if self.map_pool.pool_type else self.map_pool.order, group_pool)

    def _create_classifier(self, device=None, dtype=None) -> None:
        """The linear layer on what both poolings leave; its input is `head_hidden_size` wide."""
        group_axis = self.group_pool.order if self.group_pool.pool_type else 1
        self.head_hidden_size = self.num_features // group_axis * self.global_pool.feat_mult()  # 'catavgmax': twice
        self.fc = nn.Identity()
        if self.num_classes > 0:
            self.fc = nn.Linear(self.head_hidden_size, self.num_classes, device=device, dtype=dtype)
        self.fc.train(self.training)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters by depth: the stem, then stages (coarse) or blocks."""
        return dict(stem=r"^conv1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier on the invariant fields."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling over space unless `global_pool` is None; 0 classes: none."""
        self._check_classifier(num_classes, global_pool)
        if global_pool is not None:
            pool = self._create_global_pool(global_pool, self.group_pool.pool_type)
            self.global_pool = pool.train(self.training)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self._create_classifier(device=parameter.device, dtype=parameter.dtype)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Feature maps of several levels: 0 is the stem, 1 to 4 are the stages.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n levels if an int, all if None, else those listed.
            norm: accepted as timm demands; there is no norm after the last block.
            stop_early: skip the levels after the last one asked for.
            output_fmt: 'NCHW', the only format.
            intermediates_only: return the list alone.

        Returns:
            The last map computed and the list of maps [B, fields * |G|, H / reduction, W / reduction], or the list;
            [B, fields, ...] with `map_pool`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} does not exist for this model: use 'NCHW'")
        take_indices, max_index = feature_take_indices(5, indices)
        intermediates = []
        x = self._stem(x)
        if 0 in take_indices:
            intermediates.append(self.map_pool(x))
        x = self.maxpool(x)
        for level, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), start=1):
            if stop_early and level > max_index:
                break
            x = stage(x)
            if level in take_indices:
                intermediates.append(self.map_pool(x))
        return intermediates if intermediates_only else (self.map_pool(x), intermediates)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> the first regular fields: [B, in_chans, H, W] -> [B, width * |G|, H / 2, W / 2]."""
        x = self.check_image(x)
        if not torch.jit.is_scripting() and self._stem_fuses(x):
            return self._infer_stem(x)
        return self.act1(self.conv1(x))

    @torch.jit.unused
    def _stem_fuses(self, x: torch.Tensor) -> bool:
        return fuses(x, (self.conv1,), (self.act1,))

    @torch.jit.unused
    def _infer_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1.infer(x, relu=True)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head; returns the levels that stay.

        The head also goes with `prune_head=False` where a stage does: it is made for the fields of the last one.
        """
        take_indices, max_index = feature_take_indices(5, indices)
        for level in range(max_index + 1, 5):
            setattr(self, f"layer{level}", nn.Sequential())  # empty: passes its input on
        if max_index == 0:
            self.maxpool = nn.Identity()
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or max_index < 4:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The map of the last stage, [B, num_features, H / 32, W / 32]: regular fields, field-major, or invariant ones.

        Invariant, one channel per field, with `map_pool`.
        """
        x = self.maxpool(self._stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
            x = self.layer4(x)
        return self.map_pool(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the map over space, then over the group; classify unless `pre_logits`."""
        x = self.global_pool(x)  # [B, m], or the map [B, m, H, W] without pooling over space
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _feature_info(fields: int, group: str, reduction: int, module: str) -> dict[str, Any]:
    """timm's description of a level, with its number of regular fields and the group they belong to."""
    num_chs = fields * Group.from_name(group).order
    return dict(num_chs=num_chs, reduction=reduction, module=module, num_fields=fields, group=group)


def _batch_norm_options(norm_layer: Callable[..., nn.Module], **options: float | None) -> Callable[..., nn.Module]:
    """`norm_layer` with the batch norm options that are set; any other norm has none of them."""
    given = {name: value for name, value in options.items() if value is not None}
    if given and not (isinstance(norm_layer, type) and issubclass(norm_layer, nn.modules.batchnorm._BatchNorm)):
        raise ValueError(f"bn_{next(iter(given))} needs a batch norm, but norm_layer is {norm_layer!r}: leave it out")
    return partial(norm_layer, **given) if given else norm_layer


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `variant` through timm; see `EquivariantResNet` for the keywords, all of which may be overridden."""
    levels = kwargs.get("out_indices", ()) if kwargs.get("features_only") else ()
    for level in range(-levels, 0) if isinstance(levels, int) else levels:  # an int: the last levels
        if not -5 <= level < 5:
            raise ValueError(f"feature level {level} of out_indices={levels} does not exist: use 0 to 4, or -5 to -1")
    if kwargs.get("features_only"):
        kwargs = _features_only(**kwargs)
    build = partial(build_model_with_cfg, EquivariantResNet)
    return build_pretrained(build, variant, **kwargs) if pretrained else build(variant, pretrained, **kwargs)


def _features_only(**kwargs: Any) -> dict[str, Any]:
    """The keywords for maps alone: with `map_pool` taken from `forward_intermediates`, which pools them."""
    if "group_pool" in kwargs:
        raise ValueError(
            f"group_pool={kwargs['group_pool']!r} pools what a classifier reads, and features_only has none: use "
            "map_pool='max' or 'avg' for invariant maps"
        )
    if not kwargs.get("map_pool"):
        return kwargs
    if kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(f"feature_cls={kwargs['feature_cls']!r} takes maps before map_pool: leave it out")
    return {**kwargs, "feature_cls": "getter", "num_classes": 0}


_resnet18 = partial(_create, block=BasicBlock, layers=(2, 2, 2, 2))
_resnet50 = partial(_create, block=Bottleneck, layers=(3, 4, 6, 3))
_resnet101 = partial(_create, block=Bottleneck, layers=(3, 4, 23, 3))
_test_resnet = partial(_create, block=BasicBlock, layers=(1, 1, 1, 1))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1.conv",
        "classifier": "fc",
        "license": "mit",
        "origin_url": "https://github.com/dmklee/equivision",
        **kwargs,
    }


def _pretrained_cfg(variant: str) -> dict[str, Any]:
    """Weights of the original, converted; the cfg names a place on the Hub once they are published."""
    return _cfg(hf_hub_id=hub_id(variant), hf_hub_filename=WEIGHTS_FILE)


def _digits_cfg(variant: str) -> dict[str, Any]:
    """Weights inside the package, trained on handwritten digits by scripts/train_digits.py."""
    return _cfg(
        file=str(Path(__file__).parents[1] / "digits" / f"{variant}.safetensors"),
        num_classes=10,
        input_size=(3, 65, 65),
        pool_size=(3, 3),
        crop_pct=1.0,
        mean=(0.0, 0.0, 0.0),  # the black ground stays zero, as the padding and the corners of a turned image are
        std=(1.0, 1.0, 1.0),
        label_names=tuple("0123456789"),
        description="handwritten digits (MNIST), trained upright",
        origin_url=None,
    )


default_cfgs = generate_default_cfgs(
    {
        "c1resnet18": _cfg(),
        f"d1resnet18.{TAG}": _pretrained_cfg("d1resnet18"),
        f"c4resnet18.{TAG}": _pretrained_cfg("c4resnet18"),
        f"d4resnet18.{TAG}": _pretrained_cfg("d4resnet18"),
        f"c8resnet18.{TAG}": _pretrained_cfg("c8resnet18"),
        f"d8resnet18.{TAG}": _pretrained_cfg("d8resnet18"),
        "c1resnet18_fast": _cfg(),
        "d1resnet18_fast": _cfg(),
        "c4resnet18_fast": _cfg(),
        "d4resnet18_fast": _cfg(),
        "c8resnet18_fast": _cfg(),
        "d8resnet18_fast": _cfg(),
        "c1resnet50": _cfg(),
        f"d1resnet50.{TAG}": _pretrained_cfg("d1resnet50"),
        f"c4resnet50.{TAG}": _pretrained_cfg("c4resnet50"),
        f"d4resnet50.{TAG}": _pretrained_cfg("d4resnet50"),
        f"c8resnet50.{TAG}": _pretrained_cfg("c8resnet50"),
        "d8resnet50": _cfg(),
        "c1resnet50_fast": _cfg(),
        "d1resnet50_fast": _cfg(),
        "c4resnet50_fast": _cfg(),
        "d4resnet50_fast": _cfg(),
        "c8resnet50_fast": _cfg(),
        "d8resnet50_fast": _cfg(),
        "c1resnet101": _cfg(),
        f"d1resnet101.{TAG}": _pretrained_cfg("d1resnet101"),
        f"c4resnet101.{TAG}": _pretrained_cfg("c4resnet101"),
        f"d4resnet101.{TAG}": _pretrained_cfg("d4resnet101"),
        "c8resnet101": _cfg(),
        "d8resnet101": _cfg(),
        "c1resnet101_fast": _cfg(),
        "d1resnet101_fast": _cfg(),
        "c4resnet101_fast": _cfg(),
        "d4resnet101_fast": _cfg(),
        "c8resnet101_fast": _cfg(),
        "d8resnet101_fast": _cfg(),
        "test_c1resnet.digits": _digits_cfg("test_c1resnet"),
        "test_d4resnet.digits": _digits_cfg("test_d4resnet"),
        "test_c8resnet.digits": _digits_cfg("test_c8resnet"),
    }
)


@register_model
def c1resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-18: no symmetry (the plain twin); 78 fields, as many parameters as the plain ResNet."""
    return _resnet18("c1resnet18", pretrained, **{"group": "c1", "width": 78, **kwargs})


@register_model
def d1resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-18: mirror (left-right flips); 55 fields, as many parameters as the plain ResNet."""
    return _resnet18("d1resnet18", pretrained, **{"group": "d1", "width": 55, **kwargs})


@register_model
def c4resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-18: quarter turns; 39 fields, as many parameters as the plain ResNet."""
    return _resnet18("c4resnet18", pretrained, **{"group": "c4", "width": 39, **kwargs})


@register_model
def d4resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-18: quarter turns and mirrors; 28 fields, as many parameters as the plain ResNet."""
    return _resnet18("d4resnet18", pretrained, **{"group": "d4", "width": 28, **kwargs})


@register_model
def c8resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-18: eighth turns; 28 fields, as many parameters as the plain ResNet."""
    return _resnet18("c8resnet18", pretrained, **{"group": "c8", "width": 28, **kwargs})


@register_model
def d8resnet18(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-18: eighth turns and mirrors; 20 fields, as many parameters as the plain ResNet."""
    return _resnet18("d8resnet18", pretrained, **{"group": "d8", "width": 20, **kwargs})


@register_model
def c1resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-18: no symmetry (the plain twin); 64 fields, as many channels as the plain ResNet."""
    return _resnet18("c1resnet18_fast", pretrained, **{"group": "c1", "width": 64, **kwargs})


@register_model
def d1resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-18: mirror (left-right flips); 32 fields, as many channels as the plain ResNet."""
    return _resnet18("d1resnet18_fast", pretrained, **{"group": "d1", "width": 32, **kwargs})


@register_model
def c4resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-18: quarter turns; 16 fields, as many channels as the plain ResNet."""
    return _resnet18("c4resnet18_fast", pretrained, **{"group": "c4", "width": 16, **kwargs})


@register_model
def d4resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-18: quarter turns and mirrors; 8 fields, as many channels as the plain ResNet."""
    return _resnet18("d4resnet18_fast", pretrained, **{"group": "d4", "width": 8, **kwargs})


@register_model
def c8resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-18: eighth turns; 8 fields, as many channels as the plain ResNet."""
    return _resnet18("c8resnet18_fast", pretrained, **{"group": "c8", "width": 8, **kwargs})


@register_model
def d8resnet18_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-18: eighth turns and mirrors; 3 fields, 48 channels (the width of the original)."""
    return _resnet18("d8resnet18_fast", pretrained, **{"group": "d8", "width": 3, **kwargs})


@register_model
def c1resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-50: no symmetry (the plain twin); 70 fields, as many parameters as the plain ResNet."""
    return _resnet50("c1resnet50", pretrained, **{"group": "c1", "width": 70, **kwargs})


@register_model
def d1resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-50: mirror (left-right flips); 50 fields, as many parameters as the plain ResNet."""
    return _resnet50("d1resnet50", pretrained, **{"group": "d1", "width": 50, **kwargs})


@register_model
def c4resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-50: quarter turns; 35 fields, as many parameters as the plain ResNet."""
    return _resnet50("c4resnet50", pretrained, **{"group": "c4", "width": 35, **kwargs})


@register_model
def d4resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-50: quarter turns and mirrors; 25 fields, as many parameters as the plain ResNet."""
    return _resnet50("d4resnet50", pretrained, **{"group": "d4", "width": 25, **kwargs})


@register_model
def c8resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-50: eighth turns; 25 fields, as many parameters as the plain ResNet."""
    return _resnet50("c8resnet50", pretrained, **{"group": "c8", "width": 25, **kwargs})


@register_model
def d8resnet50(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-50: eighth turns and mirrors; 18 fields, as many parameters as the plain ResNet."""
    return _resnet50("d8resnet50", pretrained, **{"group": "d8", "width": 18, **kwargs})


@register_model
def c1resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-50: no symmetry (the plain twin); 64 fields, as many channels as the plain ResNet."""
    return _resnet50("c1resnet50_fast", pretrained, **{"group": "c1", "width": 64, **kwargs})


@register_model
def d1resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-50: mirror (left-right flips); 32 fields, as many channels as the plain ResNet."""
    return _resnet50("d1resnet50_fast", pretrained, **{"group": "d1", "width": 32, **kwargs})


@register_model
def c4resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-50: quarter turns; 16 fields, as many channels as the plain ResNet."""
    return _resnet50("c4resnet50_fast", pretrained, **{"group": "c4", "width": 16, **kwargs})


@register_model
def d4resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-50: quarter turns and mirrors; 8 fields, as many channels as the plain ResNet."""
    return _resnet50("d4resnet50_fast", pretrained, **{"group": "d4", "width": 8, **kwargs})


@register_model
def c8resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-50: eighth turns; 8 fields, as many channels as the plain ResNet."""
    return _resnet50("c8resnet50_fast", pretrained, **{"group": "c8", "width": 8, **kwargs})


@register_model
def d8resnet50_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-50: eighth turns and mirrors; 4 fields, as many channels as the plain ResNet."""
    return _resnet50("d8resnet50_fast", pretrained, **{"group": "d8", "width": 4, **kwargs})


@register_model
def c1resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-101: no symmetry (the plain twin); 70 fields, as many parameters as the plain ResNet."""
    return _resnet101("c1resnet101", pretrained, **{"group": "c1", "width": 70, **kwargs})


@register_model
def d1resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-101: mirror (left-right flips); 50 fields, as many parameters as the plain ResNet."""
    return _resnet101("d1resnet101", pretrained, **{"group": "d1", "width": 50, **kwargs})


@register_model
def c4resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-101: quarter turns; 35 fields, as many parameters as the plain ResNet."""
    return _resnet101("c4resnet101", pretrained, **{"group": "c4", "width": 35, **kwargs})


@register_model
def d4resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-101: quarter turns and mirrors; 25 fields, as many parameters as the plain ResNet."""
    return _resnet101("d4resnet101", pretrained, **{"group": "d4", "width": 25, **kwargs})


@register_model
def c8resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-101: eighth turns; 25 fields, as many parameters as the plain ResNet."""
    return _resnet101("c8resnet101", pretrained, **{"group": "c8", "width": 25, **kwargs})


@register_model
def d8resnet101(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-101: eighth turns and mirrors; 18 fields, as many parameters as the plain ResNet."""
    return _resnet101("d8resnet101", pretrained, **{"group": "d8", "width": 18, **kwargs})


@register_model
def c1resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C1 ResNet-101: no symmetry (the plain twin); 64 fields, as many channels as the plain ResNet."""
    return _resnet101("c1resnet101_fast", pretrained, **{"group": "c1", "width": 64, **kwargs})


@register_model
def d1resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D1 ResNet-101: mirror (left-right flips); 32 fields, as many channels as the plain ResNet."""
    return _resnet101("d1resnet101_fast", pretrained, **{"group": "d1", "width": 32, **kwargs})


@register_model
def c4resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C4 ResNet-101: quarter turns; 16 fields, as many channels as the plain ResNet."""
    return _resnet101("c4resnet101_fast", pretrained, **{"group": "c4", "width": 16, **kwargs})


@register_model
def d4resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D4 ResNet-101: quarter turns and mirrors; 8 fields, as many channels as the plain ResNet."""
    return _resnet101("d4resnet101_fast", pretrained, **{"group": "d4", "width": 8, **kwargs})


@register_model
def c8resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """C8 ResNet-101: eighth turns; 8 fields, as many channels as the plain ResNet."""
    return _resnet101("c8resnet101_fast", pretrained, **{"group": "c8", "width": 8, **kwargs})


@register_model
def d8resnet101_fast(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """D8 ResNet-101: eighth turns and mirrors; 4 fields, as many channels as the plain ResNet."""
    return _resnet101("d8resnet101_fast", pretrained, **{"group": "d8", "width": 4, **kwargs})


@register_model
def test_c1resnet(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """Tiny C1 ResNet for tests: no symmetry (the plain twin); 11 fields, about as many parameters as the others."""
    return _test_resnet("test_c1resnet", pretrained, **{"group": "c1", "width": 11, **kwargs})


@register_model
def test_d4resnet(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """Tiny D4 ResNet for tests: quarter turns and mirrors; 4 fields."""
    return _test_resnet("test_d4resnet", pretrained, **{"group": "d4", "width": 4, **kwargs})


@register_model
def test_c8resnet(pretrained: bool = False, **kwargs: Any) -> EquivariantResNet:
    """Tiny C8 ResNet for tests: eighth turns; 4 fields."""
    return _test_resnet("test_c8resnet", pretrained, **{"group": "c8", "width": 4, **kwargs})
