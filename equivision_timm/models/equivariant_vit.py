"""Vision transformers whose tokens rotate and reflect with the image, and whose class token can be invariant.

The networks are those of octic-vits (Nordström et al., arXiv 2505.15441, https://github.com/davnords/octic-vits; their
"D8" is the D4 of this package) and, for D1, of flopping-for-flops (arXiv 2502.05169). Tokens are one tensor [B, N, d]
in the irreps basis (layers/irreps.py); the first blocks commute with the group. The kinds differ in what follows:

- `d4vit_*`: in the middle, invariants of every token are passed to ordinary blocks of timm. The class token, the
  logits and the means over patches do not change under the group; maps of the later blocks move with the image.
- `*_full_*` and `d1vit_*`: all blocks are equivariant, the head takes invariants of the last one.
- `d4hybridvit_*`: the channels are passed on unchanged, and ordinary blocks break the symmetry. NOT invariant, NOT
  equivariant after the first half.

Rotations by 90 degrees and reflections are exact, to rounding, for every image that the patch divides, 224 x 224
included: there is no padding and no stride that skips a pixel. Angles in between are not in the group.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchDropout, global_pool_nlc, to_2tuple, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.vision_transformer import Block

from equivision_timm.errors import check_choice
from equivision_timm.layers import check_pointwise
from equivision_timm.layers.invariants import Invariants
from equivision_timm.layers.irreps import ChangeBasis, Device, DType, irreps_of
from equivision_timm.layers.patches import EquivariantPatchEmbed, UnfoldTiles, resize_tiles, tile_count, tile_size
from equivision_timm.layers.tokens import IrrepAttention, IrrepMlp, IrrepNorm, IrrepScale
from equivision_timm.models.backbone import CheckImage, init_weights
from equivision_timm.models.pretrained import WEIGHTS_FILE, build_model
from equivision_timm.models.variants import Variant, digits_cfg, register_family

__all__ = ["EquivariantBlock", "EquivariantViT"]  # the entrypoints are added below


class EquivariantBlock(nn.Module):
    """A pre-norm transformer block that commutes with the group: [B, N, |G| * fields] -> the same shape.

    Tokens are in the irreps basis; `EquivariantViT.forward_intermediates` gives regular fields. `mlp_ratio` is in units
    of `fields`, `init_values` are the initial scales of the residual branches; other arguments as of timm's Block.
    """

    def __init__(
        self,
        fields: int,
        num_heads: int,
        group: str,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-4,
        eps: float = 1e-5,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1: IrrepNorm = IrrepNorm(fields, group, eps, **dd)
        self.attn: IrrepAttention = IrrepAttention(fields, num_heads, group, attn_drop, proj_drop, **dd)
        self.ls1: IrrepScale = IrrepScale(fields, group, init_values, **dd)
        self.drop_path1: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2: IrrepNorm = IrrepNorm(fields, group, eps, **dd)
        self.mlp: IrrepMlp = IrrepMlp(fields, int(fields * mlp_ratio), group, act_layer, proj_drop, **dd)
        self.ls2: IrrepScale = IrrepScale(fields, group, init_values, **dd)
        self.drop_path2: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TransitionBlock(Block):
    """timm's block after the `transition` from tokens in the irreps basis to ordinary ones."""

    def __init__(self, transition: nn.Module, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.transition = transition

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  no masks
        x = self.transition(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EquivariantViT(nn.Module):
    """Vision transformer: images [B, in_chans, H, W] -> logits [B, num_classes].

    The first `equivariant_depth` blocks are equivariant, the others timm's. With `invariants` the logits do not change
    under the group; without (the hybrids) they do. `forward_features` returns tokens [B, prefix + N, d]: ordinary ones,
    invariant except for their place, if ordinary blocks come last; else regular fields, field-major.

    Args: as of timm's VisionTransformer, but for
        group: name of the group: 'd4', 'd1', 'c4', or another one that maps a square grid onto itself.
        img_size: the position map is made for this grid, which must be square and even for groups with rotations by
            90 degrees, and even in width for the others.
        patch_size: even.
        global_pool: input of the head: 'token' (the class token); of the patches 'avg', 'max', 'avgmax'; '' all.
        embed_dim: d, channels of a token.
        num_heads: |G| divides the width of a head.
        equivariant_depth: number of equivariant blocks; the first half if None.
        invariants: 'power', 'polynomial' or 'trivial' (only the trivial irrep; all blocks must be equivariant), or ''
            for a hybrid, which is NOT invariant.
        init_values: initial scales of the residual branches.
        equivariant_eps: of the norms of equivariant blocks.
        dynamic_img_size: accept images of every size that the patch divides; the position map is resized.
        act_layer: must be pointwise.
        drop_path_rate: the same in every block.

    Raises:
        ValueError: a value of a keyword that does not exist, does not fit the others, or would break the symmetry.

    The dropouts of channels and patches break the symmetry in training.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        group: str = "d4",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        equivariant_depth: int | None = None,
        invariants: str = "power",
        init_values: float = 1e-4,
        equivariant_eps: float = 1e-5,
        class_token: bool = True,
        reg_tokens: int = 0,
        distilled: bool = False,
        dynamic_img_size: bool = False,
        act_layer: str | Callable[..., nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        equivariant_depth = depth // 2 if equivariant_depth is None else equivariant_depth
        check_choice("equivariant_depth", equivariant_depth, range(1, depth + 1))
        kinds = ("power", "polynomial", "trivial" if equivariant_depth == depth else "")
        check_choice("invariants", invariants, kinds)
        self.group = group
        self.order: int = irreps_of(group).order
        if embed_dim % self.order:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of {self.order}, the order of {group}")
        act_layer = check_pointwise(act_layer)
        fields = embed_dim // self.order
        self.fields: int = fields
        self.num_classes: int = num_classes
        self.in_chans = in_chans
        self.num_features: int = embed_dim
        self.embed_dim: int = embed_dim
        self.has_class_token = class_token
        self.no_embed_class = True  # the position map is only for patches
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens: int = int(class_token) + int(distilled) + reg_tokens
        self.distilled = distilled
        self.distilled_training: bool = False
        self.dynamic_img_size = dynamic_img_size
        self.equivariant_depth = equivariant_depth
        self.is_invariant: bool = bool(invariants)  # not so the logits of a hybrid
        self.ends_equivariant: bool = equivariant_depth == depth
        self.grad_checkpointing: bool = False
        self._check_pool(global_pool)
        self.global_pool: str = global_pool

        # Images -> tokens in the irreps basis; class token, distillation token and registers are of the trivial irrep
        self.check_image: CheckImage = CheckImage(in_chans)
        self.patch_embed: EquivariantPatchEmbed = EquivariantPatchEmbed(
            img_size, patch_size, in_chans, fields, group, strict_img_size=not dynamic_img_size, **dd
        )
        tokens = [nn.Parameter(torch.empty(1, n, fields, **dd)) if n else None for n in (class_token, distilled)]
        self.cls_token: nn.Parameter | None = tokens[0]
        self.dist_token: nn.Parameter | None = tokens[1]
        self.reg_token: nn.Parameter | None = None
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, fields, **dd))
        tiles = self._position_tiles(img_size)
        self.pos_embed: nn.Parameter = nn.Parameter(torch.empty(tile_count(group), fields, *tiles, **dd))
        self.unfold: UnfoldTiles = UnfoldTiles(group)
        self.pos_drop: nn.Dropout = nn.Dropout(pos_drop_rate)
        self.patch_drop: nn.Module = (
            PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        )
        self.norm_pre: nn.Module = nn.Identity()  # timm's models have one here

        # Blocks: equivariant ones, then ordinary ones, the first of them with the transition
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's Block declares a class
        shared: dict[str, Any] = dict(mlp_ratio=mlp_ratio, init_values=init_values, act_layer=act_layer, **dd)
        shared.update(proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, drop_path=drop_path_rate)
        equivariant: dict[str, Any] = dict(group=group, eps=equivariant_eps, **shared)
        ordinary: dict[str, Any] = dict(qkv_bias=True, norm_layer=norm_layer, **shared)
        transition = Invariants(invariants, fields, group, embed_dim, **dd)
        self.blocks: nn.Sequential = nn.Sequential(
            *[EquivariantBlock(fields, num_heads, **equivariant) for _ in range(equivariant_depth)]
        )
        if not self.ends_equivariant:
            self.blocks.append(TransitionBlock(transition, embed_dim, num_heads, **ordinary))
            self.blocks.extend(Block(embed_dim, num_heads, **ordinary) for _ in range(depth - equivariant_depth - 1))
        self.feature_info: Sequence[dict[str, Any]] = [  # a list, but torch.jit warns if the annotation says so
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=patch_size, num_fields=count, group=of)
            for i, (of, count) in enumerate(
                [(group, fields)] * equivariant_depth + [("c1", embed_dim)] * (depth - equivariant_depth)
            )
        ]
        self.to_regular: ChangeBasis = ChangeBasis(group, "regular")
        last = IrrepNorm(fields, group, equivariant_eps, **dd) if self.ends_equivariant else norm_layer(embed_dim, **dd)
        self.norm: nn.Module = last

        # Head; with regular fields as its input, back to the irreps basis for the transition
        self.to_irreps: ChangeBasis = ChangeBasis(group, "irreps")
        self.transition: nn.Module | None = transition if self.ends_equivariant else None
        self.head_hidden_size: int = fields if invariants == "trivial" else embed_dim
        self.fc_norm: nn.Module = nn.Identity()
        if self.ends_equivariant and invariants != "trivial":
            self.fc_norm = norm_layer(embed_dim, **dd)
        self.head_drop: nn.Dropout = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.head_dist: nn.Module | None = None
        self.reset_classifier(num_classes)

        self.register_load_state_dict_pre_hook(_rename_transition)
        self.init_weights()

    def _check_pool(self, global_pool: str) -> None:
        """The tokens that there are: with `distilled` the head has one classifier for each of its two."""
        token, patches = ["token"] * self.has_class_token, [] if self.distilled else ["avg", "avgmax", "max"]
        check_choice("global_pool", global_pool, [*token, *patches, ""])

    def _position_tiles(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tiles of the position map; raises ValueError if the image or the grid has none."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        p = self.patch_embed.patch_size[0]
        if min(height, width) < p or height % p or width % p:
            raise ValueError(f"img_size {height} x {width} is not a multiple of the patch: use multiples of {p}")
        return tile_size(height // p, width // p, self.group)

    @torch.jit.unused
    def init_weights(self) -> None:
        """Initialise all weights, also of a model that comes from the meta device."""
        init_weights(self)
        trunc_normal_(self.pos_embed, std=0.16 * 0.5**0.5)
        for token in (self.cls_token, self.dist_token):
            if token is not None:
                trunc_normal_(token, std=0.16)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides those of one dimension."""
        return {"pos_embed", "cls_token", "dist_token", "reg_token"}

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth: the embedding, then each block."""
        return dict(
            stem=r"^cls_token|dist_token|reg_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm|^transition", (99999,))],
        )

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.unused
    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return the logits of both classifiers, as timm's `TokenDistillationTask` expects."""
        if not self.distilled:
            raise ValueError("the model has no distillation token: create it with distilled=True")
        self.distilled_training = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The linear classifier; with `distilled` both."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless `global_pool` is None; 0 classes: none."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like, new = self.pos_embed, nn.Identity
        if num_classes:
            new = partial(nn.Linear, self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.head = new().train(self.training)
        self.head_dist = new().train(self.training) if self.distilled else None

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether an image of this size, n or (height, width), may be rotated and reflected without any resampling."""
        sides = to_2tuple(size)
        if self.dynamic_img_size:
            return all(side % self.patch_embed.patch_size[0] == 0 for side in sides)
        return tuple(sides) == tuple(self.patch_embed.img_size)

    @torch.jit.unused
    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """The exact sizes next to `near`: the largest that is not above, the smallest not below.

        Without `dynamic_img_size` the height and width that the model accepts.
        """
        patch = self.patch_embed.patch_size[0]
        if self.dynamic_img_size:
            return max(1, near // patch) * patch, max(1, -(-near // patch)) * patch
        return self.patch_embed.img_size

    @torch.jit.unused
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position map for images of another size; ValueError, nothing changed, if it does not fit."""
        tiles = self._position_tiles(img_size)
        self.patch_embed.set_input_size(img_size)
        if tiles != self.pos_embed.shape[2:]:
            resized = resize_tiles(self.pos_embed.detach(), self.group, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Patches [B, N, |G| * fields], or [B, h, w, |G| * fields] if `dynamic_img_size`, with places and prefix."""
        positions = self.unfold(self.pos_embed).flatten(0, 1)  # [|G| * fields, h, w]
        if self.dynamic_img_size:
            size = [x.shape[1], x.shape[2]]
            positions = F.interpolate(positions.unsqueeze(0), size, mode="bicubic").squeeze(0)
            x = x.flatten(1, 2)
        tokens = [x + positions.flatten(1).t()]
        rest = (self.order - 1) * self.fields  # channels of the other irreps, which are zero
        for token in (self.reg_token, self.dist_token, self.cls_token):
            if token is not None:
                tokens.insert(0, F.pad(token, [0, rest]).expand(x.shape[0], -1, -1))
        return self.pos_drop(torch.cat(tokens, 1))

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> tokens before the first block: [B, in_chans, H, W] -> [B, prefix + N, |G| * fields]."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(self.check_image(x)))))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, prefix + N, d] after the last norm: regular fields if the last block is equivariant."""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        return self.to_regular(x) if self.ends_equivariant else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the tokens of `forward_features`, of regular fields their invariants; classify unless `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, : 2 if self.head_dist is not None else 1]
        if self.transition is not None:
            x = self.transition(self.to_irreps(x))  # [B, N, features]
        if self.head_dist is not None and self.global_pool == "token":
            x = self.head_drop(self.fc_norm(x))  # [B, 2, features]
            if pre_logits:
                return x.mean(1)
            logits, distilled = self.head(x[:, 0]), self.head_dist(x[:, 1])
            if self.distilled_training and self.training and not torch.jit.is_scripting():
                return logits, distilled  # pyright: ignore[reportReturnType]  as in timm, which TorchScript needs
            return (logits + distilled) / 2
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[torch.Tensor, list[Any]]:
        """Outputs of blocks: regular fields of the equivariant ones, ordinary channels of the others.

        Arguments as of timm's VisionTransformer; 'NCHW' are maps [B, d, H / p, W / p], 'NLC' tokens [B, N, d]. Also
        returned are the tokens after the last block computed, normed if the norm fits.

        Raises ValueError for `norm`, which only fits the last kind of block, of another one.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if norm and not self.ends_equivariant and min(take_indices) < self.equivariant_depth:
            raise ValueError(f"norm=True does not fit block {min(take_indices)}, which is equivariant: use norm=False")
        size = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self._embed(x)
        taken, fields = [], True
        for index, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            fields = index < self.equivariant_depth
            if index in take_indices:
                y = self.norm(x) if norm else x
                taken.append(self.to_regular(y) if fields else y)
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            taken = [y.transpose(1, 2).unflatten(2, size).contiguous() for y in taken]  # [B, d, h, w]
        if return_prefix_tokens:
            taken = list(zip(taken, prefix, strict=True))
        if intermediates_only:
            return taken
        x = self.norm(x) if fields == self.ends_equivariant else x
        return (self.to_regular(x) if fields else x), taken

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks after the last of `indices`, and the head; returns the indices that remain.

        Norm and head are also removed if all the ordinary blocks for which they were made are.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        lost = not self.ends_equivariant and max_index < self.equivariant_depth
        self.ends_equivariant = self.ends_equivariant or lost
        if prune_norm or lost:
            self.norm = nn.Identity()
        if prune_head or lost:
            self.transition = None
            self.head_hidden_size = self.embed_dim
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices


def _rename_transition(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints made before 0.2 have the transition under the name of `hand_over`, whatever block it belongs to."""
    new = next((name for name, _ in model.named_modules() if name.endswith("transition")), "transition")
    for name in [name for name in state_dict if name.startswith(f"{prefix}hand_over.")]:
        state_dict[prefix + name[len(prefix) :].replace("hand_over", new, 1)] = state_dict.pop(name)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: EquivariantViT) -> dict[str, torch.Tensor]:
    """The state dict for `model`, its position map resized if the model is made for another image size."""
    tiles = state_dict.get("pos_embed")
    if tiles is None or tiles.shape[:2] != model.pos_embed.shape[:2] or tiles.shape == model.pos_embed.shape:
        return state_dict
    return {**state_dict, "pos_embed": resize_tiles(tiles, model.group, model.patch_embed.grid_size)}


def _cfg(tag: str) -> dict[str, Any]:
    return {
        "num_classes": 0 if tag.startswith("dinov2") else 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/davnords/octic-vits",
        **({"hf_hub_filename": WEIGHTS_FILE} if tag not in ("", "digits") else {}),
    }


SIZES = {  # width, depth, heads
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
INVARIANT = "class token and logits invariant under rotations by 90 degrees and reflections"
HYBRID = "NOT invariant and, after its first half, NOT equivariant under rotations and reflections (a hybrid)"
MIRROR = "all blocks equivariant, logits invariant under left-right reflection"


def _row(size: str, patch_size: int = 16, tag: str = "", full: bool = False, **keywords: Any) -> Variant:
    """A row of the table: the size, the tag of published weights, keywords of `EquivariantViT`."""
    group, hybrid = keywords.get("group", "d4"), keywords.get("invariants") == ""
    kind = {"d1": MIRROR, "d4": HYBRID if hybrid else INVARIANT}[group]
    prefix = "Hybrid " if hybrid else ""
    text = f"{prefix}{group.upper()} ViT {size}, patch {patch_size}, {tag or 'no weights'}: {kind}."
    arguments: dict[str, Any] = {**SIZES[size], "patch_size": patch_size, **keywords}
    if full or group == "d1":
        arguments["equivariant_depth"] = arguments["depth"]
    if group == "d1":
        arguments.update(invariants="trivial", equivariant_eps=1e-6)
    return Variant(text, arguments, _cfg(tag), tag)


VARIANTS: dict[str, Variant] = {
    "d4vit_tiny_patch16_224": _row("tiny"),
    "d4vit_small_patch16_224": _row("small"),
    "d4vit_base_patch16_224": _row("base"),
    "d4vit_large_patch16_224": _row("large", 16, "deit3_in1k", invariants="polynomial"),
    "d4vit_huge_patch14_224": _row("huge", 14, "deit3_in1k", invariants="polynomial"),
    "d4vit_large_patch16_dinov2": _row("large", 16, "dinov2_in1k"),
    "d4vit_huge_patch16_dinov2": _row("huge", 16, "dinov2_in1k"),
    "d4vit_small_patch16_full_224": _row("small", full=True),
    "d4vit_base_patch16_full_224": _row("base", full=True),
    "d4hybridvit_large_patch16_224": _row("large", 16, "deit3_in1k", invariants=""),
    "d4hybridvit_huge_patch14_224": _row("huge", 14, "deit3_in1k", invariants=""),
    "d4hybridvit_large_patch16_dinov2": _row("large", 16, "dinov2_in1k", invariants=""),
    "d4hybridvit_huge_patch16_dinov2": _row("huge", 16, "dinov2_in1k", invariants=""),
    "d1vit_tiny_patch16_224": _row("tiny", group="d1"),
    "d1vit_small_patch16_224": _row("small", group="d1"),
    "d1vit_base_patch16_224": _row("base", group="d1"),
    "d1vit_large_patch16_224": _row("large", group="d1"),
    "d1vit_huge_patch14_224": _row("huge", 14, group="d1"),
    "test_d4vit": Variant(
        f"Tiny D4 ViT for tests: {INVARIANT}.",
        {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1.0},
        {**_cfg("digits"), **digits_cfg("test_d4vit", 64)},
        "digits",
    ),
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `name` through timm; see `EquivariantViT` for the keywords, all of which may be overridden."""
    if kwargs.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
        raise ValueError(f"feature_cls {kwargs['feature_cls']!r} would return tokens in the irreps basis: use 'getter'")
    features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    filter_fn = checkpoint_filter_fn
    return build_model(EquivariantViT, name, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **kwargs)


register_family(__name__, EquivariantViT, _create, VARIANTS)
