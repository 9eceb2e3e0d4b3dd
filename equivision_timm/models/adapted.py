"""Any model of timm made equivariant, its weights untouched.

**Symmetrized**: the model f runs on g^-1 x for every g of the group, F(x)[g] = g f(g^-1 x). The maps F are regular
fields, channel = c * |G| + g; the logits are pooled over the group. It costs |G| passes.

**Canonicalized**: a small orientation network scores the elements, the image is moved by the inverse of the best one,
f runs once, and its maps are moved back. `choice="soft"` unites the two: all views, weighted by the softmax of the
scores; the orientation network then learns with f.

Sources: Puny et al., Frame Averaging for Invariant and Equivariant Network Design (2022); Basu et al., Equi-Tuning
(2023); Kaba et al., Equivariance with Learned Canonicalization Functions (2023).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Format, nchw_to, nhwc_to
from timm.models import create_model

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group
from equivision_timm.layers.views import act, act_each, check_square

__all__ = ["Canonicalized", "Symmetrized"]

Views = Sequence[torch.Tensor]  # one map, seen from every element of the group
Run = Callable[[torch.Tensor], list[torch.Tensor]]  # images -> maps or tokens
GROUPS = ("c2", "c4", "c8", "d1", "d2", "d4", "d8")
torch.fx.wrap("check_square")  # asks for sizes: one node in a graph of torch.fx


class _Adapted(nn.Module, ABC):
    """The contract of timm for a `backbone` whose images and maps are moved by a group."""

    __jit_unused_properties__: ClassVar[list[str]] = ["feature_info", "head_hidden_size", "num_features"]

    def __init__(self, backbone: str | nn.Module, group: str, group_pool: str, chunk: int, **options: Any) -> None:
        super().__init__()
        check_choice("group", group, GROUPS)
        check_choice("group_pool", group_pool, ("avg", "prob", "max"))
        if not isinstance(backbone, str) and options:
            raise TypeError(f"{sorted(options)} are keywords of the backbone, which is a module: create it with them")
        network = create_model(backbone, **options) if isinstance(backbone, str) else backbone
        if getattr(network, "group", "c1") != "c1":
            raise ValueError(f"{type(network).__name__} is equivariant under {network.group} already: use it unadapted")
        self.backbone: Any = network  # timm's methods are not declared by nn.Module
        self.group: str = group
        self.group_pool: str = group_pool
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
        head = getattr(self.backbone, "head", None)
        pool = getattr(self.backbone, "global_pool", getattr(head, "global_pool", None))
        returns_maps = self.num_classes == 0 and getattr(pool, "pool_type", pool) == ""
        self.has_head: bool = hasattr(self.backbone, "num_classes") and not returns_maps

    @property
    def head_hidden_size(self) -> int:
        """Width of the embedding, the classifier's input."""
        return self.backbone.head_hidden_size

    # Views and features

    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError if the group rotates by 90 degrees and the images are not square."""
        if self.rotations > 2:
            check_square(x, self.group)

    def views(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """g^-1 x for `count` elements from `first` on, [count * B, C, H, W]."""
        return torch.cat([act(x, g, self.rotations, inverse=True) for g in range(first, first + count)])

    def views_at_once(self) -> int:
        """Views in a pass; in training all, so that batch norms see the whole group, whatever the image's pose."""
        return self.order if self.training or self.chunk == 0 else min(self.chunk, self.order)

    def view_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's output for every view, [|G|, B, C]."""
        outputs: list[torch.Tensor] = []
        count = self.views_at_once()
        for first in range(0, self.order, count):
            n = min(count, self.order - first)
            outputs.append(self.backbone(self.views(x, first, n)).unflatten(0, [n, -1]))
        return torch.cat(outputs)

    def view_features(self, run: Run, x: torch.Tensor) -> list[Views]:
        """What `run` returns, each map or token sequence as the list of its views, moved back."""
        count, by_view = self.views_at_once(), []
        for first in range(0, self.order, count):
            n = min(count, self.order - first)
            chunks = [output.chunk(n) for output in run(self.views(x, first, n))]
            by_view += [[self.move(chunk[i], first + i) for chunk in chunks] for i in range(n)]
        return list(zip(*by_view, strict=True))

    def move_images(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """g[b]^-1 x[b]."""
        return act_each(x, g, self.rotations, self.order > self.rotations, inverse=True)

    def move(self, x: torch.Tensor, g: int | torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """g x or g^-1 x of what the backbone returns; g is one element, or one for each image, [B]."""
        if isinstance(g, int):
            mover = partial(act, g=g, n=self.rotations, inverse=inverse)
        else:
            mover = partial(act_each, g=g, n=self.rotations, reflections=self.order > self.rotations, inverse=inverse)
        if x.ndim == 2:
            return x  # logits of a module without `num_classes`
        if x.ndim == 3:
            grid = self._grid(x.shape[1])
            prefix = x.shape[1] - grid[0] * grid[1]  # class token, registers: they do not move
            maps = x[:, prefix:].transpose(1, 2).unflatten(2, grid)  # [B, C, h, w]
            return torch.cat([x[:, :prefix], mover(maps).flatten(2).transpose(1, 2)], dim=1)
        return mover(x) if self.axis(x) == 1 else mover(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def axis(self, x: torch.Tensor) -> int:
        """The axis of the channels in features of the backbone."""
        return 1 if x.ndim == 4 and self.output_fmt == "NCHW" else x.ndim - 1

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of the grid in `tokens`."""
        count = tokens - getattr(self.backbone, "num_prefix_tokens", 0)
        height, width = getattr(getattr(self.backbone, "patch_embed", None), "grid_size", None) or (0, 0)
        if height * width != count:  # of other images than the backbone's own
            height = width = math.isqrt(count)
        return height, width

    def fields(self, views: Views) -> torch.Tensor:
        """The moved features of all views as regular fields: C * |G| channels."""
        axis = self.axis(views[0])
        return torch.stack(list(views), axis + 1).flatten(axis, axis + 1)

    def view_heads(self, x: torch.Tensor, pre_logits: bool) -> list[torch.Tensor]:
        """What the backbone's head makes of the views in regular fields, moved to where it was trained."""
        axis = self.axis(x)
        views = x.unflatten(axis, (-1, self.order)).unbind(axis + 1)
        moved = (self.move(view, g, inverse=True) for g, view in enumerate(views))
        return [self.backbone.forward_head(view, pre_logits=pre_logits) for view in moved]

    def levels(self, copies: int) -> list[dict[str, Any]]:
        """timm's description of the backbone's levels, with `copies` times the channels."""
        info = self.backbone.feature_info
        own = {"group": self.group if copies > 1 else "c1"}
        return [
            {**level, "num_chs": level["num_chs"] * copies, "num_fields": level["num_chs"], **own}
            | {"module": f"backbone.{level['module']}"}
            for level in getattr(info, "info", info)
        ]

    # timm's contract

    @abstractmethod
    def combine(self, run: Run, x: torch.Tensor, for_head: int = 0) -> list[torch.Tensor]:
        """What `run` computes of the views of x, for the image itself; the last `for_head` are for `forward_head`."""

    def pool(self, outputs: torch.Tensor, log_weights: torch.Tensor, group_pool: str) -> torch.Tensor:
        """Logits or embeddings of the views, [|G|, B, C], pooled under weights [|G|, B]: [B, C]."""
        if self.num_classes > 0 and group_pool == "prob":
            return (outputs.float().log_softmax(-1) + log_weights.unsqueeze(-1)).logsumexp(0).to(outputs.dtype)
        if self.num_classes > 0 and group_pool == "max":
            return outputs.amax(0)
        return (outputs * log_weights.exp().unsqueeze(-1)).sum(0).to(outputs.dtype)

    @torch.jit.unused
    def forward_maps(self, x: torch.Tensor) -> torch.Tensor:
        """The output of a model without a head."""
        return self.combine(lambda views: [self.backbone(views)], x)[0]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's last features; see the class for their channels."""
        return self.combine(lambda views: [self.backbone.forward_features(views)], x, int(self.has_head))[0]

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
            levels, last = (out, []) if intermediates_only else (out[1], [out[0]])
            return [*(nchw_to(level, Format(self.output_fmt)) for level in levels), *last]

        levels = self.combine(run, x, 0 if intermediates_only else int(self.has_head))
        last = [] if intermediates_only else [levels.pop()]
        if self.output_fmt == "NHWC":
            levels = [nhwc_to(level, Format.NCHW) for level in levels]
        levels = [nchw_to(level, Format(output_fmt)) for level in levels]
        return (last[0], levels) if last else levels

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's patterns that group parameters by depth."""

        def prefixed(pattern: str) -> str:
            unanchored = re.sub(r"(?<!\[)\^", "", pattern)  # timm matches from the start in any case
            return rf"backbone\.(?:{unanchored})"

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

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the backbone's classifier. `group_pool` 'prob', for trained classifiers, becomes 'avg'."""
        self.backbone.reset_classifier(num_classes, **({} if global_pool is None else {"global_pool": global_pool}))
        self._read_new_head()

    @torch.jit.unused
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the backbone's layers after the last of `indices`; returns the levels that stay."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.num_classes != self.backbone.num_classes or prune_head:
            self._read_new_head()
        return taken

    def _read_new_head(self) -> None:
        self._read_head()
        if self.group_pool == "prob":
            self.group_pool = "avg"
            self._model_args = {**getattr(self, "_model_args", {}), "group_pool": "avg"}  # for save_for_hf

    @torch.jit.unused
    def init_weights(self) -> None:
        """Draw all weights anew."""
        networks: list[Any] = list(self.children())
        for network in networks:
            network.init_weights()

    # Exact sizes

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether the whole group acts on images of this size, n or (height, width), without any resampling.

        False for groups with rotations by 45 degrees, of which the quarter turns are exact all the same.
        """
        height, width = (size, size) if isinstance(size, int) else size
        only = self._only_size()
        return self.rotations <= 4 and (self.rotations <= 2 or height == width) and only in (None, (height, width))

    @torch.jit.unused
    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """The square sizes next to `near` at which quarter turns and reflections are exact, (near, near) in general.

        Raises:
            ValueError: the backbone only accepts a rectangle.
        """
        height, width = self._only_size() or (near, near)
        if height != width:
            raise ValueError(f"the backbone only accepts {height} x {width} pixels: no square size is exact")
        return height, width

    def _only_size(self) -> tuple[int, int] | None:
        """(height, width) of the images, if the backbone takes no others, as most vision transformers."""
        patches = getattr(self.backbone, "patch_embed", None)
        size = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", False) else None
        return size and (size[0], size[1])


class Symmetrized(_Adapted):
    """The mean of a model of timm over all views of the image: images [B, in_chans, H, W] -> invariant logits.

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

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        group: str = "d4",
        group_pool: str = "avg",
        train_views: int = 0,
        chunk: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, group, group_pool, chunk, **options)
        check_choice("train_views", train_views, (0, 1))
        self.train_views: int = train_views

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.backbone.num_features * self.order

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The backbone's levels, as regular fields."""
        return self.levels(self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.has_head:
            return self.forward_maps(x)
        self.check(x)
        if self.training and self.train_views == 1:
            return self.backbone(self.move_images(x, torch.randint(self.order, (x.shape[0],), device=x.device)))
        return self.pool(self.view_logits(x), self.log_weights(x), self.group_pool)

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The same for every view, [1, 1]."""
        return x.new_full([1, 1], -math.log(self.order), dtype=torch.float32)

    def combine(self, run: Run, x: torch.Tensor, for_head: int = 0) -> list[torch.Tensor]:
        """Regular fields; the mean of vectors."""
        self.check(x)
        found = self.view_features(run, x)
        return [torch.stack(list(v)).mean(0) if v[0].ndim == 2 else self.fields(v) for v in found]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the backbone's head on the maps of the views, pooled over the group."""
        outputs = self.view_heads(x, pre_logits)
        if not self.has_head:
            return self.fields([self.move(output, g) for g, output in enumerate(outputs)])
        return self.pool(torch.stack(outputs), self.log_weights(x), "avg" if pre_logits else self.group_pool)


class Canonicalized(_Adapted):
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
            `c4orient_tiny` or `c8orient_tiny`. With a hard choice it is frozen and always in eval mode.
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
        super().__init__(backbone, group, group_pool, chunk, **options)
        check_choice("choice", choice, ("hard", "soft"))
        if group_pool != "avg" and (choice, group_pool) != ("soft", "prob"):
            raise ValueError(f"group_pool={group_pool!r} with choice={choice!r}: use 'avg', or 'prob' with 'soft'")
        if not 0 <= gate < 1 or (gate > 0 and choice == "soft"):
            raise ValueError(f"gate={gate!r} with choice={choice!r}: use 0 to 1 with 'hard', 0 with 'soft'")
        self.choice: str = choice
        self.gate: float = gate
        if orientation is None and group not in ("c4", "c8"):
            raise ValueError(f"the package has no orientation network of {group}: name one by orientation=")
        own = {name: options[name] for name in ("pretrained", "device", "dtype") if name in options}
        if not isinstance(orientation, nn.Module):
            orientation = create_model(orientation or f"{group}orient_tiny", in_chans=self.in_chans, **own)
        self.orientation: nn.Module = orientation
        found = getattr(orientation, "group", None), getattr(orientation, "num_classes", None)
        if found != (group, self.order):
            raise ValueError(f"an orientation network of {found[0]} with {found[1]} scores is not for {group}: use one")
        if choice == "hard":
            _freeze(self.orientation.eval())

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

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The backbone's levels, moved back."""
        return self.levels(1)

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Not with a gate."""
        return self.gate == 0 and super().is_exact(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.has_head:
            return self.forward_maps(x)
        self.check(x)
        if self.choice == "hard":
            return self.backbone(self.move_images(x, self.element(x)))
        return self.pool(self.view_logits(x), self.log_weights(x), self.group_pool)

    def element(self, x: torch.Tensor) -> torch.Tensor:
        """The best element [B] of a hard choice; the identity for images below the gate."""
        p = self.orientation(x).float().softmax(1)
        best = p.argmax(1)
        return torch.where(p.amax(1) < self.gate, torch.zeros_like(best), best) if self.gate > 0 else best

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The logarithms of the weights of a soft choice, [|G|, B]."""
        return self.orientation(x).float().log_softmax(1).transpose(0, 1)

    def combine(self, run: Run, x: torch.Tensor, for_head: int = 0) -> list[torch.Tensor]:
        """Features that move with the image; those for `forward_head` with the weights, and of a soft choice fields."""
        self.check(x)
        if self.choice == "hard":
            g = self.element(x)
            found = [self.move(y, g) for y in run(self.move_images(x, g))]
            weights, split = F.one_hot(g, self.order).T, len(found) - for_head
        else:
            weights, views = self.log_weights(x).exp(), self.view_features(run, x)  # [|G|, B]
            split = len(views) - for_head
            found = [
                torch.einsum("gb...,gb->b...", torch.stack(list(v)), weights.to(v[0].dtype)) for v in views[:split]
            ]
            found += [self.fields(v) for v in views[split:]]
        return found[:split] + [self._with_weights(y, weights) for y in found[split:]]

    def _with_weights(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x and |G| channels more, constant over space."""
        axis = self.axis(x)
        spread = weights.T.to(x.dtype).view(x.shape[0], *[1] * (x.ndim - 2), self.order)
        return torch.cat([x, spread.expand(*x.movedim(axis, -1).shape[:-1], -1).movedim(-1, axis)], axis)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of the backbone's head on the maps in the views that the weights name."""
        if not self.has_head:
            return x
        axis = self.axis(x)
        maps, constant = x.split([x.shape[axis] - self.order, self.order], dim=axis)
        weights = constant.movedim(axis, -1).flatten(1, -2)[:, 0].T  # [|G|, B]
        if self.choice == "hard":
            view = self.move(maps, weights.argmax(0), inverse=True)
            return self.backbone.forward_head(view, pre_logits=pre_logits)
        outputs = torch.stack(self.view_heads(maps, pre_logits))
        return self.pool(outputs, weights.float().log(), "avg" if pre_logits else self.group_pool)


def _freeze(network: nn.Module) -> None:
    """Turn parameters into buffers: no gradients, which DDP and timm demand of every parameter, and the same keys."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
