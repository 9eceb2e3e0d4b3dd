"""Equivariant ResNets: residual networks whose features rotate and reflect with the image.

The network is the one of equivision (Klee, https://github.com/dmklee/equivision): a ResNet of steerable convolutions
on regular fields; after the spatial pooling the maximum over the group makes the logits invariant.

Rotations by 90 degrees and reflections in the group are exact where every stride-2 layer sees an odd size: images of
n x n pixels with n = 1 mod 32 (225, 257, ...), or of any size with `even='box'`, as in the alias-free models. Rotations
by 45 degrees are approximate: the pixel grid resamples.

So `input_size` in the configurations of the others is 225. The released weights of equivision were trained and
evaluated at 224 by their author; to repeat published accuracies, give `--img-size 224` to timm's scripts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropBlock2d, DropPath, get_norm_layer

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group
from equivision_timm.layers import (
    Blur2d,
    ConvNormAct,
    FieldAttention,
    check_pointwise,
    check_positionwise,
    element_major_stage,
    get_aa_layer,
)
from equivision_timm.models.backbone import EquivariantBackbone
from equivision_timm.models.pretrained import WEIGHTS_FILE, build_model, hub_id
from equivision_timm.models.variants import Variant, digits_cfg, register_family

Layer = Callable[..., nn.Module]
Unit = Callable[..., ConvNormAct]

__all__ = ["BasicBlock", "Bottleneck", "EquivariantResNet"]  # register_model adds every entrypoint


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, in_fields * |G|, H, W] -> [B, fields * |G|, H / stride, W / stride].

    Args:
        unit: makes the `ConvNormAct`s of the network; group, norm, activation and kind of kernels are given.
        stride: of the first convolution and of the shortcut.
        dilation: of the second convolution; `first_dilation`: of the first.
        aa_layer: makes the low pass that strides instead of the convolution, after its activation; None for none.
        avg_down: makes the low pass that strides in the shortcut, before its convolution; None for none.
        attn_layer: makes the attention of (fields, |G|) before the sum; None for none.
        drop_block: makes the layer that drops blocks of pixels after the first norm; None for none.
        drop_path: probability of dropping the residual branch of a sample in training.
    """

    expansion = 1

    def __init__(
        self,
        in_fields: int,
        fields: int,
        unit: Unit,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        aa_layer: Layer | None = None,
        avg_down: Layer | None = None,
        attn_layer: Layer | None = None,
        drop_block: Layer | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        conv_stride, aa = _split_stride(stride, aa_layer)
        self.aa: nn.Module = aa
        strided = partial(unit, stride=conv_stride, dilation=first_dilation, drop=drop_block and drop_block())

        def last(in_fields: int, out_fields: int, kernel_size: int, **options: Any) -> ConvNormAct:
            attn, drop = attn_layer and attn_layer(out_fields), DropPath(drop_path) if drop_path else None
            return unit(in_fields, out_fields, kernel_size, attn=attn, drop=drop, **options)

        self.create_branch(in_fields, fields, unit, strided, last, dilation)
        self.downsample: nn.Module = _shortcut(unit, in_fields, fields * self.expansion, stride, avg_down)

    def create_branch(self, in_fields: int, fields: int, unit: Unit, strided: Unit, last: Unit, dilation: int) -> None:
        """Assign the convolutions of the residual branch."""
        self.conv1: ConvNormAct = strided(in_fields, fields, 3)
        self.conv2: ConvNormAct = last(fields, fields, 3, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        x = self.aa(self.conv1(x))
        return self.conv2(x, shortcut)


class Bottleneck(BasicBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; arguments as in `BasicBlock`, four times `fields` at the output."""

    expansion = 4

    def create_branch(self, in_fields: int, fields: int, unit: Unit, strided: Unit, last: Unit, dilation: int) -> None:
        """See `BasicBlock`."""
        self.conv1: ConvNormAct = unit(in_fields, fields, 1)
        self.conv2: ConvNormAct = strided(fields, fields, 3)
        self.conv3: ConvNormAct = last(fields, fields * self.expansion, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        x = self.conv1(x)
        x = self.aa(self.conv2(x))
        return self.conv3(x, shortcut)


class Stage(nn.Sequential):
    """Residual blocks, one after the other."""

    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The stage in the irreps basis where that costs less; called by timm's `reparameterize_model` on its copy."""
        return element_major_stage(self, (BasicBlock, Bottleneck, nn.Sequential, Stage))


def _split_stride(stride: int, aa_layer: Layer | None) -> tuple[int, nn.Module]:
    """The stride of the convolution, and the low pass that strides after it, if any."""
    if stride == 1 or aa_layer is None:
        return stride, nn.Identity()
    return 1, aa_layer(stride=stride)


def _shortcut(unit: Unit, in_fields: int, out_fields: int, stride: int, avg_down: Layer | None) -> nn.Module:
    """From the input of a block to its output."""
    if stride == 1 and in_fields == out_fields:
        return nn.Identity()
    if stride == 1 or avg_down is None:
        return unit(in_fields, out_fields, 1, stride=stride, act_layer=None)
    return nn.Sequential(avg_down(stride=stride), unit(in_fields, out_fields, 1, act_layer=None))


class EquivariantResNet(EquivariantBackbone):
    """ResNet on regular fields: images [B, in_chans, H, W] -> logits [B, num_classes] that the group leaves unchanged.

    Levels of features: the stem at H / 2, the four stages at H / 4 to H / 32; see `EquivariantBackbone`.

    Args: as of timm's ResNet, but for
        group: name of the group, for example 'c8'.
        width: fields of the stem and of the first stage; the stages have 1, 2, 4 and 8 times as many.
        stem_type: '' for one 7x7 convolution; 'deep' for three of 3x3, with half of `width` inside, 'deep_tiered' with
            three quarters of that in the first.
        stem_pool: pooling after the stem, 'max' or 'blur' (only a low pass: a maximum makes high frequencies).
        avg_down: whether the shortcuts average before a 1x1 convolution instead of striding it. timm averages
            2 x 2 pixels, which at odd sizes is not equivariant; here it is the low pass of `aa_layer`, or of 3 x 3
            pixels.
        aa_layer: low pass before each stride except the stem's: 'blur' (timm's BlurPool2d) or 'blur5'; '' for none.
        even: '' or 'box': before a stride of 2, a map of even length n becomes one of n - 1 by the mean of neighbours,
            along the axes that the group reverses; where a low pass strides, it takes one tap more (`Blur2d`). The
            network is then exact at every image size, but another one at even sizes than without: for a digit network
            that was trained without, 64 x 64 pixels, the accuracy falls from 96 to 31 %.
        low_pass: whether the 3x3 convolutions have smooth kernels of 5x5 pixels with as many coefficients, see
            `SteerableConv2d`, and the image is blurred; for equivariance at angles between the quarter turns.
        block_args: of the blocks, as in timm: {'attn_layer': 'se'} or 'eca', one scale for each field.
        global_pool: timm's pooling over space: 'avg', 'max', 'avgmax', 'catavgmax', or '' to keep the map.
        group_pool: pooling over the group, after the pooling over space: 'max', 'avg', or '' to keep the group axis
            (the logits then depend on the orientation).
        map_pool: pooling of all maps over the group, 'max' or 'avg'; '' keeps them equivariant.
        act_layer: must be pointwise.
        norm_layer: applied per field.
        bn_momentum, bn_eps: of the batch norms, PyTorch's 0.1 and 1e-5 if None.
        zero_init_last: False by default, as in the original network.
        cutoff: the kernels' functions at distance r from the centre have angular frequencies up to cutoff * r; None for
            the original's rule, see `Kernel`.
        conv_strategy: see `set_conv_strategy`.

    Raises:
        ValueError: an argument that does not exist or would break equivariance; a classifier without global pooling,
            or with `map_pool`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        group: str,
        width: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        stem_type: str = "",
        replace_stem_pool: bool = False,
        stem_pool: str = "max",
        avg_down: bool = False,
        aa_layer: str = "",
        even: str = "",
        low_pass: bool = False,
        block_args: dict[str, Any] | None = None,
        global_pool: str = "avg",
        group_pool: str = "max",
        map_pool: str = "",
        act_layer: str | Callable[..., nn.Module] = nn.ReLU,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        drop_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        cutoff: int | None = None,
        conv_strategy: str | dict[str, str] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(group, in_chans, map_pool, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("output_stride", output_stride, (8, 16, 32))
        check_choice("even", even, ("", "box"))
        self.even = even
        act_layer = check_pointwise(act_layer)
        if act_layer is nn.ReLU:  # for the gradient of SiLU and others PyTorch would copy what it overwrites
            act_layer = partial(nn.ReLU, inplace=True)
        bn_options = {"momentum": bn_momentum, "eps": bn_eps}
        given = {name: value for name, value in bn_options.items() if value is not None}
        norm_layer = partial(cast(Layer, get_norm_layer(norm_layer)), **given)
        check_positionwise(norm_layer, width)

        parsed = Group.from_name(group)
        axes = parsed.reversed_axes if even else (False, False)
        aa = partial(get_aa_layer(aa_layer), even=axes) if aa_layer else None
        blur = aa or partial(Blur2d, taps=3, even=axes)
        attn_layer = partial(FieldAttention, order=parsed.order, **block_args, **dd) if block_args else None

        # Stem: trivial fields (the image) -> regular fields
        norm_act: dict[str, Any] = {"norm_layer": norm_layer, "act_layer": act_layer}
        unit = partial(ConvNormAct, group=group, cutoff=cutoff, even=bool(even), **norm_act, **dd)
        self.conv1: nn.Module = _stem(unit, in_chans, width, stem_type, low_pass, axes)
        self.act1: nn.Module
        self.add_level("act1", nn.Identity(), width, reduction=2)  # in conv1; as many children as timm's, for cuts [:n]
        spatial = partial(_spatial, unit, low_pass=low_pass)
        self.maxpool: nn.Module = _stem_pool(spatial, width, aa, blur, stem_pool, replace_stem_pool, axes)

        # Stages
        self.layer1: nn.Module
        self.layer2: nn.Module
        self.layer3: nn.Module
        self.layer4: nn.Module
        drop_rates = [drop_path_rate * index / max(1, sum(layers) - 1) for index in range(sum(layers))]
        in_fields, reduction, dilation = width, 4, 1
        for stage, depth in enumerate(layers):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation
            if reduction * stride > output_stride:  # dilate instead of striding, from this stage's second 3x3 on
                stride, dilation = 1, dilation * stride
            reduction *= stride
            drop_block = _drop_block(stage, drop_block_rate)
            blocks = []
            for index in range(depth):
                blocks.append(
                    block(
                        in_fields,
                        width * 2**stage,
                        spatial,
                        stride=stride if index == 0 else 1,
                        dilation=dilation,
                        first_dilation=first_dilation if index == 0 else dilation,
                        aa_layer=aa,
                        avg_down=blur if avg_down else None,
                        attn_layer=attn_layer,
                        drop_block=drop_block,
                        drop_path=drop_rates.pop(0),
                    )
                )
                in_fields = width * 2**stage * block.expansion
            self.add_level(f"layer{stage + 1}", Stage(*blocks), in_fields, reduction)

        self.create_head(num_classes, global_pool, group_pool, conv_strategy)
        if zero_init_last:
            self._zero_init_last()

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] -> the first regular fields [B, width * |G|, H / 2, W / 2]."""
        return self.act1(self.conv1(x))

    def pool_stem(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width * |G|, H / 2, W / 2] -> [B, width * |G|, H / 4, W / 4]."""
        return self.maxpool(x)

    def stages(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width * |G|, H / 4, W / 4] -> [B, fields * |G|, H / 32, W / 32], the map of the last stage."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """At every size with `even`."""
        return bool(self.even) or super().is_exact(size)

    def remove_stem_pool(self) -> None:
        self.maxpool = nn.Identity()

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters by depth: the stem, then stages (coarse) or blocks."""
        return dict(stem=r"^conv1|^maxpool", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    @torch.jit.unused
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draw all weights anew."""
        super().init_weights()
        if zero_init_last:
            self._zero_init_last()

    def _zero_init_last(self) -> None:
        for module in self.modules():
            if isinstance(module, BasicBlock):
                last = module.conv3 if isinstance(module, Bottleneck) else module.conv2
                nn.init.zeros_(last.get_parameter("norm.per_field.weight"))


def _spatial(
    unit: Unit, in_fields: int, out_fields: int, kernel_size: int, low_pass: bool, **kwargs: Any
) -> ConvNormAct:
    """A unit whose 3x3 kernels are smooth ones of 5x5 pixels, if `low_pass`."""
    smooth = low_pass and kernel_size == 3
    return unit(in_fields, out_fields, 5 if smooth else kernel_size, low_pass=smooth, **kwargs)


def _stem(unit: Unit, in_chans: int, width: int, stem_type: str, low_pass: bool, even: tuple[bool, bool]) -> nn.Module:
    """[B, in_chans, H, W] -> [B, width * |G|, H / 2, W / 2]."""
    check_choice("stem_type", stem_type, ("", "deep", "deep_tiered"))
    if stem_type == "":
        stem = partial(unit, in_chans, width, 7, input_type="trivial", stride=2)
        return nn.Sequential(Blur2d(taps=3, stride=1, even=even), stem(even=False)) if low_pass else stem()
    inner = max(1, width // 2)
    first = max(1, 3 * inner // 4) if stem_type == "deep_tiered" else inner
    spatial = partial(_spatial, unit, low_pass=low_pass)
    return nn.Sequential(
        spatial(in_chans, first, 3, input_type="trivial", stride=2),
        spatial(first, inner, 3),
        spatial(inner, width, 3),
    )


def _stem_pool(
    spatial: Unit,
    width: int,
    aa: Layer | None,
    blur: Layer,
    stem_pool: str,
    replace_stem_pool: bool,
    even: tuple[bool, bool],
) -> nn.Module:
    """[B, width * |G|, H / 2, W / 2] -> [B, width * |G|, H / 4, W / 4]."""
    check_choice("stem_pool", stem_pool, ("max", "blur"))
    if replace_stem_pool:
        stride, low_pass = _split_stride(2, aa)
        conv = spatial(width, width, 3, stride=stride)
        return conv if aa is None else nn.Sequential(conv, low_pass)
    if stem_pool == "blur":
        return blur(stride=2)
    if aa is None:
        pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        return nn.Sequential(Blur2d(taps=1, stride=1, even=even), pool) if any(even) else pool
    return nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), aa(stride=2))


def _drop_block(stage: int, rate: float) -> Layer | None:
    """timm's: blocks of 5 pixels in the third stage, of 3 in the fourth."""
    if not rate or stage < 2:
        return None
    block_size, gamma_scale = ((5, 0.25), (3, 1.0))[stage - 2]
    return partial(DropBlock2d, drop_prob=rate, block_size=block_size, gamma_scale=gamma_scale)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `variant` through timm; see `EquivariantResNet` for the keywords, all of which may be overridden."""
    if kwargs.get("features_only"):
        kwargs = _features_only(**kwargs)
    elif "reresnet" in variant and kwargs.get("num_classes", 1000) == 1000:
        kwargs = {"group_pool": "", **kwargs}  # what the published classifier reads
    return build_model(EquivariantResNet, variant, pretrained, pretrained_filter_fn=_averaged_classifier, **kwargs)


def _averaged_classifier(state_dict: dict[str, torch.Tensor], model: EquivariantResNet) -> dict[str, torch.Tensor]:
    """A classifier of all channels, for a model that pools the group by its mean, so that the logits are invariant.

    The mean over the group of the logits sum_fg w[c, f, g] x[f, g] under its cyclic shifts of the axis g is
    sum_f (sum_g w[c, f, g]) mean_g x[f, g].
    """
    weight, order = state_dict.get("fc.weight"), model.group_pool.order
    if weight is None or model.group_pool.pool_type != "avg" or not isinstance(model.fc, nn.Linear):
        return state_dict
    if weight.shape[1] != order * model.fc.in_features:
        return state_dict
    summed = weight.unflatten(1, (-1, order)).sum(2)  # [classes, fields * |G|] -> [classes, fields]
    return {**state_dict, "fc.weight": summed}


def _features_only(**kwargs: Any) -> dict[str, Any]:
    """The keywords for `features_only`: with `map_pool`, maps come from `forward_intermediates`, which pools them."""
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


_LAYERS: dict[int, dict[str, Any]] = {
    10: dict(block=BasicBlock, layers=(1, 1, 1, 1)),
    18: dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    50: dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    101: dict(block=Bottleneck, layers=(3, 4, 23, 3)),
}


def _symmetry(group: str) -> str:
    """The transformations to which a network of this group is invariant, in words."""
    found = Group.from_name(group)
    rotations = f"rotations by {360 / found.rotations:g} degrees" if found.rotations > 1 else ""
    reflections = ("reflections" if rotations else "left-right reflection") if found.reflections else ""
    return " and ".join(filter(None, (rotations, reflections))) or "no symmetry (the plain twin)"


def _row(name: str, depth: int, group: str, width: int, keywords: dict[str, Any]) -> Variant:
    """A row of the table: name, depth, group, fields of the first stage, keywords of the network."""
    channels = width * Group.from_name(group).order
    summary = f"{group.upper()} ResNet-{depth}: {_symmetry(group)}; {width} fields, {channels} channels"
    if keywords:
        summary += f"; {', '.join(f'{name}={value!r}' for name, value in keywords.items())}"
    cfg: dict[str, Any] = {
        "num_classes": 1000,
        "input_size": (3, 225, 225),
        "pool_size": (8, 8),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1.0.conv" if "stem_type" in keywords else "conv1.conv",
        "classifier": "fc",
        "license": "mit",
        "origin_url": "https://github.com/dmklee/equivision",
    }
    if "low_pass" in keywords:  # a blur of the image comes first
        cfg.update(first_conv="conv1.1.conv")
    if "even" in keywords:  # exact at every size
        cfg.update(input_size=(3, 224, 224), pool_size=(7, 7))
    tag = "equivision_in1k" if name in _RELEASED else ""
    if name.startswith("test_"):
        summary, tag = f"{summary}; tiny, for tests", "digits"
        cfg.update(digits_cfg(name, 65), pool_size=(3, 3))
    elif "reresnet" in name:
        summary += ". A backbone for oriented detection. With 1000 classes the logits are NOT invariant, as published"
        summary += " (group_pool='avg' makes them); maps are equivariant"
        tag = "redet_in1k"
        cfg.update(license="apache-2.0", origin_url="https://github.com/csuhan/ReDet")
    if tag.endswith("in1k"):
        cfg.update(hf_hub_id=hub_id(name, tag), hf_hub_filename=WEIGHTS_FILE)
    return Variant(summary, {**_LAYERS[depth], "group": group, "width": width, **keywords}, cfg, tag)


# What rotates between the quarter turns, too: see scripts/benchmarks/angle.md for what each step buys
_ALIAS_FREE: dict[str, Any] = dict(
    low_pass=True, aa_layer="blur5", avg_down=True, stem_pool="blur", act_layer="silu", even="box"
)
# ReDet's: more functions of the plane in each kernel
_REDET: dict[str, Any] = dict(cutoff=3, zero_init_last=True)
# Fields of the first stage: of the models that have as many parameters as the plain ResNet, and of the fast ones
_WIDTHS: dict[int, dict[str, tuple[int, int]]] = {
    18: {"c1": (78, 64), "d1": (55, 32), "c4": (39, 16), "d4": (28, 8), "c8": (28, 8), "d8": (20, 3)},
    50: {"c1": (70, 64), "d1": (50, 32), "c4": (35, 16), "d4": (25, 8), "c8": (25, 8), "d8": (18, 4)},
    101: {"c1": (70, 64), "d1": (50, 32), "c4": (35, 16), "d4": (25, 8), "c8": (25, 8), "d8": (18, 4)},
}
_RELEASED = {f"{group}resnet{depth}" for group in ("d1", "c4", "d4") for depth in (18, 50, 101)}
_RELEASED |= {"c8resnet18", "d8resnet18", "c8resnet50"}
_ROWS: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    f"{group}resnet{depth}{suffix}": (depth, group, widths[suffix != ""], {})
    for depth, groups in _WIDTHS.items()
    for group, widths in groups.items()
    for suffix in ("", "_fast")
}
_ROWS |= {
    "c16resnet18": (18, "c16", 20, {}),
    "c16resnet50": (50, "c16", 18, {}),
    "c6resnet18_fast": (18, "c6", 11, {}),
    "c8resnet50d": (50, "c8", 25, dict(stem_type="deep", avg_down=True)),
    "c8resnetaa50d": (50, "c8", 25, dict(stem_type="deep", avg_down=True, aa_layer="blur")),
    "c8resnetblur50": (50, "c8", 25, dict(aa_layer="blur")),
    "c4resnetaf18": (18, "c4", 39, _ALIAS_FREE),
    "c8resnetaf18": (18, "c8", 28, _ALIAS_FREE),
    "d8resnetaf18": (18, "d8", 20, _ALIAS_FREE),
    "c8resnetaf50": (50, "c8", 25, _ALIAS_FREE),
    "c8resnetaf18_fast": (18, "c8", 8, _ALIAS_FREE),
    "d8resnetaf18_fast": (18, "d8", 5, _ALIAS_FREE),
    "c8reresnet50": (50, "c8", 8, _REDET),
    "c8reresnet101": (101, "c8", 8, _REDET),
    "test_c1resnet": (10, "c1", 11, {}),
    "test_d4resnet": (10, "d4", 4, {}),
    "test_c8resnet": (10, "c8", 4, {}),
    "test_c8resnetaf": (10, "c8", 4, _ALIAS_FREE),
}
VARIANTS = {name: _row(name, *row) for name, row in _ROWS.items()}
register_family(__name__, EquivariantResNet, _create, VARIANTS)
