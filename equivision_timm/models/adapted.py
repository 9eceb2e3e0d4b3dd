"""Any model of timm made equivariant, its weights untouched.

**Symmetrized**: the model f runs on g^-1 x for every g of the group, F(x)[g] = g f(g^-1 x). The maps F are regular
fields, channel = c * |G| + g; the logits are pooled over the group. It costs |G| passes.

**Canonicalized**: a small orientation network weights the elements. The best one has all the weight, f runs once, and
its maps are moved back; or `choice="soft"`, f runs on all views, and the orientation network learns with it.

Sources: Puny et al., Frame Averaging for Invariant and Equivariant Network Design (2022); Basu et al., Equi-Tuning
(2023); Kaba et al., Equivariance with Learned Canonicalization Functions (2023).
"""

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Format, nchw_to
from timm.models import create_model
from timm.models._input import update_model_args

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group
from equivision_timm.layers.views import act, act_each

__all__ = ["Canonicalized", "Symmetrized"]

Run = Callable[[torch.Tensor], list[torch.Tensor]]  # images -> features, channels first


class Symmetrized(nn.Module):
    """A model of timm averaged over all views of the image: images [B, in_chans, H, W] -> invariant logits.

    `forward_features`, `forward_intermediates` and `features_only` give regular fields: maps [B, C * |G|, H, W], tokens
    [B, N, C * |G|] (prefix tokens are not moved, grid tokens are), or [B, H, W, C * |G|] if the backbone has its
    channels last. `num_classes=0` gives the mean over the group of the embedding, an invariant vector.

    For groups with rotations by 45 degrees `forward_head(forward_features(x))` resamples the maps twice and differs
    from `forward(x)`; use the latter.

    Args:
        backbone: name of a model of timm, with or without a tag; or the model. Of a module without `num_classes` maps
            become regular fields, as those of a segmentation network; logits are averaged.
        group: 'c2', 'c4', 'c8', 'd1', 'd2', 'd4' or 'd8'. Rotations by 90 degrees need square images.
        group_pool: of the logits over the group: their mean 'avg', the logarithm of the mean probability 'prob' (for
            pretrained classifiers that were not fine-tuned), or 'max'. Embeddings are always averaged.
        train_views: views of an image in a training step: 0 for all; 1 draws an element for each image, in `forward`.
        chunk: views in a pass outside training, 0 for all: memory grows with them.
        **options: of the backbone.

    Raises:
        ValueError: an unknown group or pooling; 'prob' with fewer than two classes; a backbone that is equivariant.

    Example:
        >>> model = Symmetrized("test_resnet", group="c4").eval()
        >>> x = torch.randn(2, 3, 64, 64)
        >>> torch.allclose(model(x.rot90(1, dims=(-2, -1))), model(x), atol=1e-5)
        True
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["feature_info", "num_features"]

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        group: str = "d4",
        group_pool: str = "avg",
        train_views: int = 0,
        chunk: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("group", group, ("c2", "c4", "c8", "d1", "d2", "d4", "d8"))
        check_choice("group_pool", group_pool, ("avg", "prob", "max"))
        check_choice("train_views", train_views, (0, 1))
        if not isinstance(backbone, str) and options:
            raise TypeError(f"{sorted(options)} are keywords of the backbone, which is a module: create it with them")
        network = create_model(backbone, **options) if isinstance(backbone, str) else backbone
        if getattr(network, "group", "c1") != "c1":
            raise ValueError(f"{type(network).__name__} is equivariant under {network.group} already: use it unadapted")
        self.backbone: Any = network  # timm's methods are not declared by nn.Module
        self.group: str = group
        self.map_group: str = group  # of the levels
        self.group_pool: str = group_pool
        self.train_views: int = train_views
        self.chunk: int = chunk
        self.order: int = Group.from_name(group).order
        self.rotations: int = Group.from_name(group).rotations
        self.in_chans: int = getattr(network, "in_chans", 3)
        self.output_fmt: str = str(getattr(network, "output_fmt", "NCHW"))  # of `forward_features`, unless tokens
        self._read_head()
        if group_pool == "prob" and self.num_classes < 2:
            raise ValueError(f"group_pool='prob' averages probabilities of {self.num_classes} class(es): use 'avg'")

    def _read_head(self) -> None:
        """Note how many classes the backbone has, and whether it returns vectors: logits or an embedding."""
        self.num_classes: int = getattr(self.backbone, "num_classes", 0)
        self.head_hidden_size: int = getattr(self.backbone, "head_hidden_size", 0)
        head = getattr(self.backbone, "head", None)
        pool = getattr(self.backbone, "global_pool", getattr(head, "global_pool", None))
        returns_maps = self.num_classes == 0 and getattr(pool, "pool_type", pool) == ""
        self.has_head: bool = hasattr(self.backbone, "num_classes") and not returns_maps

    # The definition: F(x)[g] = g f(g^-1 x)

    def chunks(self) -> list[list[int]]:
        """The elements of each pass; in training all in one, so that batch norms see the whole group."""
        count = self.order if self.training or self.chunk == 0 else self.chunk
        return [list(range(first, min(first + count, self.order))) for first in range(0, self.order, count)]

    def views(self, x: torch.Tensor, elements: list[int]) -> torch.Tensor:
        """g^-1 x for each of the elements, [len(elements) * B, C, H, W]."""
        return torch.cat([act(x, g, self.rotations, inverse=True) for g in elements])

    def moved_back(self, run: Run, x: torch.Tensor) -> list[torch.Tensor]:
        """F(x) of each output f of `run`, [|G|, B, C, ...]."""
        by_view: list[list[torch.Tensor]] = []
        for elements in self.chunks():
            outputs = [y.chunk(len(elements)) for y in run(self.views(x, elements))]
            by_view += [[self.move(y[i], g) for y in outputs] for i, g in enumerate(elements)]
        return [torch.stack(views) for views in zip(*by_view, strict=True)]

    def move(self, x: torch.Tensor, g: int | torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """g x or g^-1 x of images or features, channels first; g is one element, or one for each image, [B]."""
        if x.ndim == 2:  # logits and embeddings
            return x
        if x.ndim == 3:  # tokens [B, C, N]
            grid = self._grid(x.shape[2])
            prefix = getattr(self.backbone, "num_prefix_tokens", x.shape[2] - math.prod(grid))
            maps = self.move(x[..., prefix:].unflatten(2, grid), g, inverse)  # [B, C, h, w]
            return torch.cat([x[..., :prefix], maps.flatten(2)], dim=2)  # class token, registers: they do not move
        return act(x, g, self.rotations, inverse) if isinstance(g, int) else act_each(x, g, self.rotations, inverse)

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of the grid in `tokens`: those of the backbone's own image size, or a square."""
        count = tokens - getattr(self.backbone, "num_prefix_tokens", 0)
        height, width = getattr(getattr(self.backbone, "patch_embed", None), "grid_size", None) or (0, 0)
        return (height, width) if height * width == count else (math.isqrt(count), math.isqrt(count))

    # Logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.has_head:
            return self.forward_maps(x)
        chosen = self.element(x)
        if chosen is not None:
            return self.backbone(act_each(x, chosen, self.rotations, inverse=True))
        outputs = torch.cat([self.backbone(self.views(x, elements)) for elements in self.chunks()])
        return self.pool(outputs.unflatten(0, [self.order, -1]), self.log_weights(x))

    def element(self, x: torch.Tensor) -> torch.Tensor | None:
        """The element [B] of the only view that each image needs; None for all views."""
        one = self.training and self.train_views == 1
        return torch.randint(self.order, (x.shape[0],), device=x.device) if one else None

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The logarithms of the weights of all views, [|G|, B]; here the same for each, [1, 1]."""
        return x.new_full([1, 1], -math.log(self.order), dtype=torch.float32)

    def pool(self, outputs: torch.Tensor, log_weights: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits or embeddings of the views, [|G|, B, C], pooled under weights [|G|, B]: [B, C]."""
        log_weights = log_weights.unsqueeze(-1)
        if self.group_pool == "avg" or pre_logits or self.num_classes == 0:
            return (outputs * log_weights.exp()).sum(0).to(outputs.dtype)
        if self.group_pool == "max":
            return outputs.amax(0)
        return (outputs.float().log_softmax(-1) + log_weights).logsumexp(0).to(outputs.dtype)

    # Maps

    def combine(self, run: Run, x: torch.Tensor, for_head: bool = False) -> list[torch.Tensor]:
        """Regular fields of the outputs of `run`; the mean of vectors. `for_head`: `forward_head` takes the last."""
        return [y.mean(0) if y.ndim == 3 else y.movedim(0, 2).flatten(1, 2) for y in self.moved_back(run, x)]

    @torch.jit.unused
    def forward_maps(self, x: torch.Tensor) -> torch.Tensor:
        """The output of a model without a head."""
        return self.to_backbone(self.combine(lambda views: [self.from_backbone(self.backbone(views))], x)[0])

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's last features; see the class for their channels."""
        run = self.backbone.forward_features
        return self.to_backbone(self.combine(lambda views: [self.from_backbone(run(views))], x, for_head=True)[0])

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        *,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options: Any,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The backbone's levels and last features; arguments as in timm."""
        options |= dict(indices=indices, output_fmt="NCHW", intermediates_only=intermediates_only)

        def run(views: torch.Tensor) -> list[torch.Tensor]:
            out = self.backbone.forward_intermediates(views, **options)
            return out if intermediates_only else [*out[1], self.from_backbone(out[0])]

        levels = self.combine(run, x, for_head=not intermediates_only)
        last = None if intermediates_only else self.to_backbone(levels.pop())
        levels = [nchw_to(level, Format(output_fmt)) for level in levels]
        return levels if last is None else (last, levels)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the backbone's head on the maps of the views, pooled over the group."""
        outputs = self.head_outputs(self.from_backbone(x), pre_logits)
        if self.has_head:
            return self.pool(outputs, self.log_weights(x), pre_logits)
        maps = [self.move(self.from_backbone(y), g) for g, y in enumerate(outputs)]
        return self.to_backbone(torch.stack(maps, 2).flatten(1, 2))

    def head_outputs(self, fields: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        """Outputs [|G|, B, ...] of the backbone's head on the views in regular fields, as it saw them."""
        views = enumerate(fields.unflatten(1, (-1, self.order)).unbind(2))
        inputs = [self.to_backbone(self.move(view, g, inverse=True)) for g, view in views]
        return torch.stack([self.backbone.forward_head(y, pre_logits=pre_logits) for y in inputs])

    def from_backbone(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the backbone, channels first: vectors [B, C], tokens [B, C, N] or maps [B, C, H, W]."""
        return x.movedim(1 if x.ndim == 4 and self.output_fmt == "NCHW" else -1, 1)

    def to_backbone(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `from_backbone`."""
        return x.movedim(1, 1 if x.ndim == 4 and self.output_fmt == "NCHW" else -1)

    # What timm asks of the backbone

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.backbone.num_features * self.order

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The backbone's levels, as fields of `map_group`."""
        info, copies = self.backbone.feature_info, Group.from_name(self.map_group).order
        return [
            {**level, "num_chs": level["num_chs"] * copies, "num_fields": level["num_chs"], "group": self.map_group}
            | {"module": f"backbone.{level['module']}"}
            for level in getattr(info, "info", info)
        ]

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's patterns that group parameters by depth."""

        def prefixed(pattern: str) -> str:  # without anchors, since timm matches from the start in any case
            return r"backbone\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"

        return {
            name: prefixed(spec) if isinstance(spec, str) else [(prefixed(pattern), last) for pattern, last in spec]
            for name, spec in self.backbone.group_matcher(coarse=coarse).items()
            if spec is not None
        }

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """The parameters that the backbone exempts from weight decay."""
        return {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's stages in the backward pass instead of storing their activations."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the backbone's classifier. `group_pool` 'prob', for trained classifiers, becomes 'avg'."""
        self.backbone.reset_classifier(num_classes, **({} if global_pool is None else {"global_pool": global_pool}))
        self._read_head()
        if self.group_pool == "prob":
            self.group_pool = "avg"
            update_model_args(self, group_pool="avg")  # for save_for_hf

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the backbone's layers after the last of `indices`; returns the levels that stay."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    # Exact sizes

    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether the whole group acts on images of this size, n or (height, width), without any resampling.

        False for groups with rotations by 45 degrees, of which the quarter turns are exact all the same.
        """
        height, width = (size, size) if isinstance(size, int) else size
        fits = self._only_size() in (None, (height, width))
        return fits and (self.rotations <= 2 or (self.rotations == 4 and height == width))

    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """Square sizes with exact quarter turns and reflections: (near, near), or the backbone's only size."""
        return self._only_size() or (near, near)

    def _only_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, if the backbone takes no others, as most vision transformers."""
        patches = getattr(self.backbone, "patch_embed", None)
        size = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
        return size and (size[0], size[1])


class Canonicalized(Symmetrized):
    """A model of timm on images that an orientation network puts upright: [B, in_chans, H, W] -> invariant logits.

    `forward_intermediates` and `features_only` give the backbone's maps [B, C, H, W], moved back so that they rotate
    with the image. The features of `forward_features` end with |G| channels more, the weights of the elements, from
    which `forward_head` knows the views: C + |G| channels, one weight of which is 1; with `choice="soft"` the regular
    fields and the weights, (C + 1) * |G|. A model without a head gives the maps only.

    Of an image that is symmetric itself two elements score alike: its maps may jump, its logits do not.

    Args:
        backbone: as in `Symmetrized`; maps of a module without `num_classes` are moved back.
        group: as in `Symmetrized`.
        group_pool: with `choice="soft"`, the weighted mean of logits 'avg' or of probabilities 'prob', whose loss is
            -log sum_g p_g q_g(y) in training.
        orientation: name of a network with |G| scores that permute with the group, or the network; None for
            `c2orient_lite0`, `c4orient_lite0` or `c8orient_lite0`. With a hard choice it is frozen, in eval mode.
        choice: 'hard' takes the best element; 'soft' all, weighted.
        gate: an image whose best element has a smaller probability is left as it is, and is not invariant then.
        chunk: as in `Symmetrized`, for the soft choice.
        **options: of the backbone; `pretrained`, `in_chans`, `device` and `dtype` of the orientation network, too.

    Raises:
        ValueError: as in `Symmetrized`; an orientation network of another group.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        group: str = "c4",
        group_pool: str = "avg",
        orientation: str | nn.Module | None = None,
        choice: str = "hard",
        gate: float = 0.0,
        chunk: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, group, group_pool, chunk=chunk, **options)
        check_choice("choice", choice, ("hard", "soft"))
        check_choice("group_pool", group_pool, ("avg",) if choice == "hard" else ("avg", "prob"))
        if not 0 <= gate < 1 or (gate > 0 and choice == "soft"):
            raise ValueError(f"gate={gate!r} with choice={choice!r}: use 0 to 1 with 'hard', 0 with 'soft'")
        self.map_group = "c1"
        self.choice: str = choice
        self.gate: float = gate
        if not isinstance(orientation, nn.Module):
            own = {name: options[name] for name in ("pretrained", "device", "dtype") if name in options}
            orientation = create_model(orientation or f"{group}orient_lite0", in_chans=self.in_chans, **own)
        self.orientation: nn.Module = orientation
        found = getattr(orientation, "group", None), getattr(orientation, "num_classes", None)
        if found != (group, self.order):
            raise ValueError(f"an orientation network of {found[0]} with {found[1]} scores is not for {group}: use one")
        if choice == "hard":
            for module in self.orientation.eval().modules():  # parameters become buffers, with the same keys:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())  # DDP demands a gradient of every parameter

    def train(self, mode: bool = True) -> "Canonicalized":
        """As in PyTorch; but a frozen orientation network stays in eval mode, since batch statistics change it."""
        super().train(mode)
        if self.choice == "hard":
            self.orientation.eval()
        return self

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        copies = self.order if self.choice == "soft" and self.has_head else 1
        return self.backbone.num_features * copies + (self.order if self.has_head else 0)

    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Not with a gate."""
        return self.gate == 0 and super().is_exact(size)

    def element(self, x: torch.Tensor) -> torch.Tensor | None:
        """The best element [B] of a hard choice; the identity for images below the gate."""
        if self.choice == "soft":
            return None
        p = self.orientation(x).float().softmax(1)
        return p.argmax(1).masked_fill(p.amax(1) < self.gate, 0)

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The logarithms of the weights of a soft choice, [|G|, B]."""
        return self.orientation(x).float().log_softmax(1).transpose(0, 1)

    def combine(self, run: Run, x: torch.Tensor, for_head: bool = False) -> list[torch.Tensor]:
        """Outputs of `run` that move with the image; `for_head`: the last with the weights, of a soft choice fields."""
        g = self.element(x)
        if g is not None:
            weights = F.one_hot(g, self.order).T  # [|G|, B]
            found = [self.move(y, g) for y in run(self.move(x, g, inverse=True))]
            last = found[-1]
        else:
            weights, views = self.log_weights(x).exp(), self.moved_back(run, x)
            found = [torch.einsum("gb...,gb->b...", view, weights.to(view.dtype)) for view in views]
            last = views[-1].movedim(0, 2).flatten(1, 2)
        if for_head and self.has_head:
            spread = weights.T.to(last.dtype).view(*weights.T.shape, *[1] * (last.ndim - 2))
            found[-1] = torch.cat([last, spread.expand(-1, -1, *last.shape[2:])], dim=1)
        return found

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the backbone's head on the maps in the views that the weights name."""
        if not self.has_head:
            return self.backbone.forward_head(x, pre_logits=pre_logits)  # works pixel by pixel
        x = self.from_backbone(x)
        maps, constant = x.split([x.shape[1] - self.order, self.order], dim=1)
        weights = constant.flatten(2)[..., 0].T  # [|G|, B]
        if self.choice == "hard":
            view = self.move(maps, weights.argmax(0), inverse=True)
            return self.backbone.forward_head(self.to_backbone(view), pre_logits=pre_logits)
        return self.pool(self.head_outputs(maps, pre_logits), weights.float().log(), pre_logits)
