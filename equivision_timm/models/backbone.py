"""Shared parts of the convolutional families: head, feature levels, exact sizes, strategies."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group
from equivision_timm.layers import GroupPool, InvariantPool, SteerableConv2d, conv_input_shapes
from equivision_timm.torch_state import has_sizes

__all__ = ["CheckImage", "EquivariantBackbone", "check_classifier", "init_weights"]


class CheckImage(nn.Module):
    """Returns images [B, in_chans, H, W] as they are; AssertionError for anything else."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.in_chans = in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not `assert`: torch.compile would treat the sizes in its message as constants
        if has_sizes(x) and (x.ndim != 4 or x.shape[1] != self.in_chans):
            raise AssertionError(
                f"expected images [B, {self.in_chans}, H, W], got {x.shape}: add the batch, or set in_chans"
            )
        return x


def check_classifier(num_classes: int, global_pool: str | None, map_pool: str) -> None:
    """ValueError for a classifier on a map."""
    if num_classes > 0 and (global_pool == "" or map_pool):
        raise ValueError(
            f"a classifier of {num_classes} on a map, global_pool={global_pool!r} and map_pool={map_pool!r}: "
            "use num_classes=0"
        )


def init_weights(model: nn.Module) -> None:
    """Initialise `model` as timm's transformers and ConvNeXts: linear layers N(0, 0.02^2), truncated; others reset."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


class EquivariantBackbone(nn.Module, ABC):
    """Images [B, in_chans, H, W] -> logits [B, num_classes] that the group leaves unchanged.

    `forward` runs `stem`, then `pool_stem`, then the stages `layer1`, `layer2`, ...; maps between them are regular
    fields, plain tensors [B, fields * |G|, H', W'], field-major (channel = field * |G| + element). The head pools over
    space, then over the group (the two do not commute), then classifies. With `num_classes=0, global_pool=''` the model
    returns the last map: the equivariant one for `group_pool=''`, else the invariant one, [B, fields, H', W'].

    With `map_pool='max'` or 'avg' every map that leaves the model is invariant, one channel per field, for heads that
    know nothing of the group; `num_features`, `feature_info` and `head_hidden_size` then count fields. A classifier is
    refused: its input would not be what the pretrained classifiers were trained on.

    A subclass calls `super().__init__`, assigns its modules (`add_level` for the stem and each stage), defines `stem`,
    `pool_stem` and `stages`, and ends with `create_head`.
    """

    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ("group_pool", "is_invariant")

    def __init__(self, group: str, in_chans: int = 3, map_pool: str = "", drop_rate: float = 0.0) -> None:
        super().__init__()
        check_choice("map_pool", map_pool, ("max", "avg", ""))
        self.group = group
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing: bool = False
        self.feature_info: list[dict[str, Any]] = []
        self._map_group = "c1" if map_pool else group  # pooled, a field is one channel that nothing permutes
        self._map_pool = map_pool
        self.check_image: CheckImage = CheckImage(in_chans)

    # Building

    def add_level(self, name: str, module: nn.Module, fields: int, reduction: int) -> None:
        """Assign the stem or a stage to `name`, as a level of features: `fields` at 1 / `reduction` of the image."""
        self.add_module(name, module)
        channels = fields * Group.from_name(self._map_group).order
        self.feature_info.append(
            dict(num_chs=channels, reduction=reduction, module=name, num_fields=fields, group=self._map_group)
        )

    def create_head(
        self, num_classes: int, global_pool: str, group_pool: str, conv_strategy: str | dict[str, str]
    ) -> None:
        """Pooling and classifier on the last level; see `EquivariantResNet` for the arguments."""
        order = Group.from_name(self.group).order
        self.map_pool: GroupPool = GroupPool(order, self._map_pool)
        self.num_features: int = self.feature_info[-1]["num_chs"]
        self.global_pool: InvariantPool = InvariantPool("", 1 if self._map_pool else order, group_pool)
        self.reset_classifier(num_classes, global_pool)
        self.set_conv_strategy(conv_strategy)

    # Running

    @abstractmethod
    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] -> the first regular fields."""

    @abstractmethod
    def pool_stem(self, x: torch.Tensor) -> torch.Tensor:
        """From the stem's fields to the first stage's input."""

    @abstractmethod
    def stages(self, x: torch.Tensor) -> torch.Tensor:
        """All stages, one after the other."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The map of the last stage, [B, num_features, H', W']: regular fields, or invariant ones with `map_pool`."""
        x = self.pool_stem(self.stem(self.check_image(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self._stage_modules(), x, flatten=True)
        else:
            x = self.stages(x)
        return self.map_pool(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the map over space, then over the group; classify unless `pre_logits`."""
        x = self.global_pool(x)  # [B, m], or the map [B, m, H, W] without pooling over space
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.unused
    def _stage_modules(self) -> list[nn.Module]:
        return [self.get_submodule(level["module"]) for level in self.feature_info[1:]]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Maps [B, fields * |G|, H / reduction, W / reduction] of the levels: 0 is the stem, 1, 2, ... are the stages.

        Arguments as in timm; `norm` has no effect, because there is no norm after the last block.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}' does not exist for this model: use 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.stem(self.check_image(x))
        if 0 in take_indices:
            intermediates.append(self.map_pool(x))
        x = self.pool_stem(x)
        for level, stage in enumerate(self._stage_modules(), start=1):
            if stop_early and level > max_index:
                break
            x = stage(x)
            if level in take_indices:
                intermediates.append(self.map_pool(x))
        return intermediates if intermediates_only else (self.map_pool(x), intermediates)

    # The interface of timm

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The linear classifier on the invariant fields."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling over space unless `global_pool` is None; 0 classes: none."""
        check_classifier(num_classes, global_pool, self.map_pool.pool_type)
        order, group_pool = self.group_pool.order, self.group_pool.pool_type
        if global_pool is not None:
            self.global_pool = InvariantPool(global_pool, order, group_pool).train(self.training)
        self.num_classes: int = num_classes
        feat_mult = self.global_pool.feat_mult()  # 'catavgmax': twice
        self.head_hidden_size: int = self.num_features // (order if group_pool else 1) * feat_mult
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            self.fc = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.fc.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and with them or `prune_head` the head; returns the levels."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        removed = self.feature_info[max_index + 1 :]
        for level in removed:
            self.set_submodule(level["module"], nn.Sequential())  # empty: passes its input on
        if max_index == 0:
            self.remove_stem_pool()
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or removed:
            self.reset_classifier(0, "")
        return take_indices

    @abstractmethod
    def remove_stem_pool(self) -> None:
        """Let `pool_stem` return its input; called if only the stem is left."""

    @torch.jit.unused
    def init_weights(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    @property
    def group_pool(self) -> GroupPool:
        """The pooling over the group, after that over space."""
        return self.global_pool.group_pool

    # Exact sizes, strategies

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether an image of this size, n or (height, width), may be rotated and reflected without any resampling.

        A layer of stride 2 keeps the outermost pixels on both sides where it sees an odd size, so the side has to be
        1 modulo the largest reduction, 225 say, along the axes that the group reverses (`Group.reversed_sides`).
        """
        height, width = (size, size) if isinstance(size, int) else size
        sides = Group.from_name(self.group).reversed_sides(height, width)
        return all(side % self._reduction() == 1 for side in sides)

    @torch.jit.unused
    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """The exact sizes, see `is_exact`, next to `near`: the largest that is not above, the smallest not below.

        Example:
            >>> import timm, equivision_timm
            >>> timm.create_model("test_c8resnet").exact_sizes(near=224)
            (193, 225)
        """
        if self.is_exact(near):
            return near, near
        reduction = self._reduction()
        below = (near - 1) // reduction * reduction + 1
        return max(below, reduction + 1), below + reduction

    def _reduction(self) -> int:
        return max(level["reduction"] for level in self.feature_info)

    @property
    def is_invariant(self) -> bool:
        """Whether the group leaves the logits unchanged."""
        return bool(self.group_pool.pool_type or self.map_pool.pool_type)

    @torch.jit.unused
    def set_conv_strategy(self, strategy: str | dict[str, str]) -> None:
        """How to compute the convolutions: faster or slower, with the same output but for float noise.

        Args:
            strategy: 'auto' (chosen for each layer and input size), 'expand', 'block_diagonal' or 'native', for
                all convolutions of regular fields (the stem, whose input is an image, always expands); or a mapping
                from names of layers to these, as `conv_strategies` returns it, which leaves other layers as they are.
                If one is unknown or cannot run there, nothing is changed.
        """
        layers = self._convolutions()
        if isinstance(strategy, str):
            strategy = {name: strategy for name, layer in layers.items() if layer.input_type == "regular"}
        unknown = [name for name in strategy if name not in layers]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a convolution of this model: see conv_strategies()")
        for name, value in strategy.items():
            layers[name].check_strategy(value)
        for name, value in strategy.items():
            layers[name].strategy = value

    @torch.jit.unused
    def conv_strategies(self, size: int = 224, batch_size: int = 8) -> dict[str, str]:
        """The strategy that each convolution takes for `batch_size` images of size x size pixels: {layer: strategy}."""
        image = next(self.parameters()).new_zeros(1, self.in_chans, size, size)
        layers, shapes = self._convolutions(), conv_input_shapes(self, image)
        return {name: layers[name].strategy_for((batch_size, *s[1:]), image.device) for name, s in shapes.items()}

    def _convolutions(self) -> dict[str, SteerableConv2d]:
        return {name: module for name, module in self.named_modules() if isinstance(module, SteerableConv2d)}
