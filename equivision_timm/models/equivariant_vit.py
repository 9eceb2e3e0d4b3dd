"""Vision transformers whose tokens rotate and reflect with the image, and whose class token can be invariant.

The networks are those of octic-vits (Nordström et al., arXiv 2505.15441, https://github.com/davnords/octic-vits; their
"D8" is the D4 of this package) and, for D1, of flopping-for-flops (arXiv 2502.05169). Tokens are one tensor [B, N, d]
in the irreps basis (layers/irreps.py); the blocks commute with the group. What follows them makes the kind of network:

- `d4vit_*`: in the middle, invariants of every token are handed to ordinary blocks of timm. The class token, the
  logits and the means over patches do not change under the group; maps of the later blocks move with the image.
- `*_full_*` and `d1vit_*`: all blocks are equivariant, invariants are taken of what the last one returns.
- `d4hybridvit_*`: the channels go on as they are, and ordinary blocks break the symmetry. NOT invariant, NOT
  equivariant behind the first half.

Rotations by 90 degrees and reflections are exact, to rounding, for every image that the patch divides, 224 x 224
included: there is no padding and no stride that skips a pixel. Angles in between are not in the group.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    PatchDropout,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block

from equivision_timm.kernels import Kernel
from equivision_timm.layers import CheckImage, check_pointwise
from equivision_timm.layers.invariants import Invariants
from equivision_timm.layers.irreps import ChangeBasis, irreps_of
from equivision_timm.layers.patches import EquivariantPatchEmbed, UnfoldTiles, resize_tiles, tile_count, tile_size
from equivision_timm.layers.tokens import IrrepAttention, IrrepMlp, IrrepNorm, IrrepScale
from equivision_timm.models.pretrained import WEIGHTS_FILE, build_pretrained
from equivision_timm.models.variants import Variant, digits_cfg, register_family

__all__ = ["EquivariantBlock", "EquivariantViT"]  # the entrypoints are added below

torch.fx.wrap("resample_abs_pos_embed")  # looks at sizes: one node in a graph of torch.fx

POOLS = ("token", "avg", "avgmax", "max", "")


class EquivariantBlock(nn.Module):
    """A pre-norm transformer block that commutes with the group: [B, N, |G| * fields] -> the same shape.

    Args:
        fields: number of fields.
        num_heads: attention heads.
        group: name of the group.
        mlp_ratio: fields between the linear layers of the perceptron, in units of `fields`.
        init_values: scales of the residual branches at the start.
        eps: of the norms.
        act_layer: pointwise activation.
        proj_drop: dropout behind linear layers.
        attn_drop: dropout of attention weights.
        drop_path: probability of dropping a residual branch of a sample in training.
        device: where to create the parameters.
        dtype: their type.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1: IrrepNorm = IrrepNorm(fields, group, eps=eps, **dd)
        self.attn: IrrepAttention = IrrepAttention(
            fields, num_heads, group, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.ls1: IrrepScale = IrrepScale(fields, group, init_values, **dd)
        self.drop_path1: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2: IrrepNorm = IrrepNorm(fields, group, eps=eps, **dd)
        self.mlp: IrrepMlp = IrrepMlp(fields, int(fields * mlp_ratio), group, act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2: IrrepScale = IrrepScale(fields, group, init_values, **dd)
        self.drop_path2: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class InvariantTokens(nn.Module):
    """Tokens in the irreps basis -> ordinary tokens that the group leaves unchanged: [..., |G| * fields] -> [..., dim].

    Args:
        kind: which invariants, see `Invariants`.
        fields: number of fields.
        group: name of the group.
        dim: features of a token; the invariants themselves where they are 'trivial'.
        device: where to create the parameters.
        dtype: their type.
    """

    def __init__(
        self,
        kind: str,
        fields: int,
        group: str,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.invariants: Invariants = Invariants(kind, fields, group)
        self.proj: nn.Module = nn.Identity()
        self.out_features: int = self.invariants.out_features
        if kind != "trivial":
            self.proj = nn.Linear(self.out_features, dim, device=device, dtype=dtype)
            self.out_features = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.invariants(x))


class ChannelsAsTheyAre(nn.Module):
    """The hand-over of the hybrids, which breaks the symmetry: the channels of E copy by copy, as octic-vits has them.

    [..., |G| * fields] -> the same shape, rows and copies of E swapped: E0+ E0- E1+ E1- becomes E0+ E1+ E0- E1-.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.rows: int = irreps.rows
        self.multiplicity: int = irreps.multiplicity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (self.order, -1))  # [..., |G|, fields]
        if self.rows > 0:
            plane = blocks[..., self.ones :, :].unflatten(-2, (self.rows, self.multiplicity))
            blocks = torch.cat([blocks[..., : self.ones, :], plane.transpose(-3, -2).flatten(-3, -2)], -2)
        return blocks.flatten(-2)


class EquivariantViT(nn.Module):
    """Vision transformer: images [B, in_chans, H, W] -> logits [B, num_classes].

    The first `equivariant_depth` blocks are equivariant, the others timm's. With `invariants` the logits do not change
    under the group; without (the hybrids) they do. `forward_features` returns tokens [B, prefix + N, d]: ordinary ones,
    invariant but for their place, where ordinary blocks come last; else regular fields, field-major.

    Args:
        group: name of the group: 'd4', 'd1', 'c4', or another one that maps a square grid onto itself.
        img_size: height and width in pixels, or both; the position map is made for this grid, which must be square and
            even for groups with rotations by 90 degrees, and even in width for the others.
        patch_size: side of the patches in pixels, even.
        in_chans: number of image channels.
        num_classes: number of classes; 0 removes the classifier.
        global_pool: what the head reads: 'token' (the class token); of the patches 'avg', 'max', 'avgmax'; '' all.
        embed_dim: d, channels of a token.
        depth: number of blocks.
        num_heads: attention heads; |G| divides their width.
        mlp_ratio: hidden features of the perceptrons, in units of d.
        equivariant_depth: how many blocks are equivariant; the first half where None.
        invariants: 'power', 'polynomial' or 'trivial' (the trivial irrep alone; all blocks must be equivariant), or ''
            for a hybrid, which is NOT invariant.
        init_values: scales of the residual branches at the start.
        equivariant_eps: of the norms of equivariant blocks.
        class_token: whether there is one.
        reg_tokens: number of registers, further tokens without a place.
        dynamic_img_size: take images of every size that the patch divides; the position map is resized.
        act_layer: activation, a name timm knows or a class; must be pointwise.
        drop_rate: dropout in front of the classifier.
        pos_drop_rate: dropout of tokens' channels behind the position map.
        patch_drop_rate: fraction of the patches left out in training.
        proj_drop_rate: dropout behind linear layers of the blocks.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth, the same in every block.
        fix_init: divide the last weights of every residual branch by the root of twice the number of its block.
        device: where to create parameters.
        dtype: their type.

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
        dynamic_img_size: bool = False,
        act_layer: str | Callable[..., nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fix_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        equivariant_depth = depth // 2 if equivariant_depth is None else equivariant_depth
        self.group = group
        self.order: int = irreps_of(group).order
        self._check(embed_dim, depth, equivariant_depth, invariants)
        act_layer = check_pointwise(act_layer)
        fields = embed_dim // self.order
        self.fields: int = fields
        self.num_classes: int = num_classes
        self.in_chans = in_chans
        self.num_features: int = embed_dim
        self.embed_dim: int = embed_dim
        self.has_class_token = class_token
        self.no_embed_class = True  # the position map is for patches alone
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens: int = int(class_token) + reg_tokens
        self.dynamic_img_size = dynamic_img_size
        self.equivariant_depth = equivariant_depth
        self.fix_init = fix_init
        self.grad_checkpointing: bool = False
        self._check_pool(global_pool)
        self.global_pool: str = global_pool

        # Images -> tokens in the irreps basis
        self.check_image: CheckImage = CheckImage(in_chans, min_size=patch_size)
        self.patch_embed: EquivariantPatchEmbed = EquivariantPatchEmbed(
            img_size, patch_size, in_chans, fields, group, strict_img_size=not dynamic_img_size, **dd
        )
        self.cls_token: nn.Parameter | None = None  # trivial irrep, as the registers
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, fields, **dd))
        self.reg_token: nn.Parameter | None = None
        if reg_tokens:
            self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, fields, **dd))
        tiles = self._position_tiles(self.patch_embed.grid_size)
        self.pos_embed: nn.Parameter = nn.Parameter(torch.empty(tile_count(group), fields, *tiles, **dd))
        self.unfold: UnfoldTiles = UnfoldTiles(group)
        self.pos_drop: nn.Dropout = nn.Dropout(pos_drop_rate)
        self.patch_drop: nn.Module = (
            PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        )

        # Blocks: equivariant ones, the hand-over, ordinary ones
        shared: dict[str, Any] = {
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "init_values": init_values,
            "act_layer": act_layer,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "drop_path": drop_path_rate,
            **dd,
        }
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's Block says that it takes classes alone
        self.blocks: nn.Sequential = nn.Sequential(
            *[EquivariantBlock(fields, group=group, eps=equivariant_eps, **shared) for _ in range(equivariant_depth)],
            *[
                Block(embed_dim, qkv_bias=True, norm_layer=norm_layer, **shared)
                for _ in range(depth - equivariant_depth)
            ],
        )
        self.feature_info: Sequence[dict[str, Any]] = [  # a list, but torch.jit warns where the annotation says so
            _feature_info(index, embed_dim, patch_size, group if index < equivariant_depth else "c1")
            for index in range(depth)
        ]
        self.is_invariant: bool = bool(invariants)  # of the group: not so a hybrid's logits
        self.hand_over: nn.Module
        if invariants:
            self.hand_over = InvariantTokens(invariants, fields, group, embed_dim, **dd)
        else:
            self.hand_over = ChannelsAsTheyAre(group)
        self.ends_equivariant: bool = equivariant_depth == depth  # then the hand-over is part of the head
        self.to_regular: ChangeBasis = ChangeBasis(group, "regular")
        self.to_irreps: ChangeBasis = ChangeBasis(group, "irreps")
        self.norm: nn.Module
        if self.ends_equivariant:
            self.norm = IrrepNorm(fields, group, eps=equivariant_eps, **dd)
        else:
            self.norm = norm_layer(embed_dim, **dd)

        # Head
        self.reads_fields: bool = self.ends_equivariant
        self.head_hidden_size: int = fields if invariants == "trivial" else embed_dim
        self.fc_norm: nn.Module = nn.Identity()
        if self.reads_fields and invariants != "trivial":
            self.fc_norm = norm_layer(embed_dim, **dd)
        self.head_drop: nn.Dropout = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.init_weights()

    def _check(self, embed_dim: int, depth: int, equivariant_depth: int, invariants: str) -> None:
        """Raises ValueError where these do not make a network."""
        if embed_dim % self.order:
            nearest = max(1, round(embed_dim / self.order)) * self.order
            raise ValueError(
                f"embed_dim {embed_dim} does not consist of fields of {self.group}, {self.order} channels each: use, "
                f"for example, {nearest}"
            )
        if not 0 < equivariant_depth <= depth:
            raise ValueError(
                f"equivariant_depth {equivariant_depth} is none of the {depth} blocks: use 1 to {depth}, or None for "
                "the first half"
            )
        ordinary = equivariant_depth < depth
        if invariants == "trivial" and ordinary:
            raise ValueError(
                f"invariants 'trivial' are for networks whose {depth} blocks are all equivariant, but "
                f"equivariant_depth is {equivariant_depth}: use 'power'"
            )
        if not invariants and not ordinary:
            raise ValueError(
                f"invariants '' makes a hybrid, but all {depth} blocks are equivariant: use invariants='power', or an "
                f"equivariant_depth below {depth}"
            )

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"unknown global_pool {global_pool!r}: use one of {POOLS}")
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool 'token' needs the class token: use class_token=True, or global_pool='avg'")

    def _position_tiles(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tiles of the position map; raises ValueError if the image or the grid has none."""
        height, width = self.patch_embed.img_size
        p = self.patch_embed.patch_size[0]
        if min(grid) < 1 or height % p or width % p:
            raise ValueError(
                f"img_size {height} x {width} is not a multiple of the patch of {p} x {p} pixels: use, for example, "
                f"{max(1, round(height / p)) * p} x {max(1, round(width / p)) * p}"
            )
        try:
            return tile_size(*grid, self.group)
        except ValueError as error:
            side = 2 * p
            fitting = max(1, round(max(height, width) / side)) * side
            raise ValueError(
                f"img_size {height} x {width} gives the position map a grid that {self.group} does not fit ({error}). "
                f"Use img_size={fitting}, with dynamic_img_size=True to take {height} x {width} as well"
            ) from error

    @torch.jit.unused
    def init_weights(self) -> None:
        """Draw all weights anew, for a model that came from the meta device, say."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        trunc_normal_(self.pos_embed, std=0.16 * 0.5**0.5)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.16)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        if self.fix_init:
            with torch.no_grad():
                for number, block in enumerate(self.blocks, start=1):
                    for layer in (block.get_submodule("attn.proj"), block.get_submodule("mlp.fc2")):
                        for name, parameter in layer.named_parameters():
                            if name != "bias":
                                parameter.div_((2.0 * number) ** 0.5)

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides those of one dimension."""
        return {"pos_embed", "cls_token", "reg_token"}

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth: the embedding, then each block; the hand-over goes with the next."""
        after = 99999 if self.ends_equivariant else self.equivariant_depth
        return dict(
            stem=r"^cls_token|reg_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^hand_over", (after,)), (r"^norm|^fc_norm", (99999,))],
        )

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless `global_pool` is None; 0 classes: none."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)

    @torch.jit.unused
    def is_exact(self, size: int | tuple[int, int]) -> bool:
        """Whether an image of this size, n or (height, width), may be rotated and reflected without any resampling."""
        sides = (size, size) if isinstance(size, int) else size
        if not self.dynamic_img_size:
            return tuple(sides) == tuple(self.patch_embed.img_size)
        return all(side % patch == 0 for side, patch in zip(sides, self.patch_embed.patch_size, strict=True))

    @torch.jit.unused
    def exact_sizes(self, near: int = 224) -> tuple[int, int]:
        """The exact sizes next to `near`: the largest that is not above, the smallest not below."""
        if not self.dynamic_img_size:
            return self.patch_embed.img_size[0], self.patch_embed.img_size[0]
        patch = self.patch_embed.patch_size[0]
        return max(1, near // patch) * patch, max(1, -(-near // patch)) * patch

    @torch.jit.unused
    def kernels(self) -> set[Kernel]:
        """None: its coefficients are of no kernels in a basis."""
        return set()

    @torch.jit.unused
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Make the position map for images of another size, resized from the present one.

        Raises:
            ValueError: a size that does not fit, or another patch size; nothing has changed.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_embed.patch_size:
            raise ValueError(
                f"patch_size {patch_size} is not that of this model, {self.patch_embed.patch_size[0]}, for which its "
                "kernels were made: resize the images instead"
            )
        if img_size is None:
            return
        before = self.patch_embed.img_size
        try:
            self.patch_embed.set_input_size(img_size)
            tiles = self._position_tiles(self.patch_embed.grid_size)
        except ValueError:
            self.patch_embed.set_input_size(before)
            raise
        if tiles != self.pos_embed.shape[2:]:
            resized = resize_tiles(self.pos_embed.detach(), self.group, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> tokens in front of the first block: [B, in_chans, H, W] -> [B, prefix + N, |G| * fields]."""
        x = self.check_image(x)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.patch_embed(x)
        positions = self.unfold(self.pos_embed).flatten(0, 1).flatten(1).t().unsqueeze(0)  # [1, N, |G| * fields]
        if self.dynamic_img_size:
            new, old = [grid[0], grid[1]], [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]]
            positions = resample_abs_pos_embed(
                positions, new_size=new, old_size=old, num_prefix_tokens=0, antialias=False
            )
        tokens = [x + positions]
        rest = (self.order - 1) * self.fields  # channels of the other irreps, where these are zero
        if self.reg_token is not None:
            tokens.insert(0, F.pad(self.reg_token, [0, rest]).expand(x.shape[0], -1, -1))
        if self.cls_token is not None:
            tokens.insert(0, F.pad(self.cls_token, [0, rest]).expand(x.shape[0], -1, -1))
        return self.patch_drop(self.pos_drop(torch.cat(tokens, 1)))

    def _fields(self, x: torch.Tensor) -> torch.Tensor:
        """Irreps basis -> regular fields, field-major: [B, N, |G| * fields] -> channel = field * |G| + element."""
        blocks = x.unflatten(2, (self.order, self.fields)).permute(2, 0, 1, 3)  # [|G|, B, N, fields]
        return self.to_regular(blocks).permute(1, 2, 3, 0).flatten(2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, prefix + N, d] behind the last norm: regular fields where the last block is equivariant."""
        x = self._embed(x)
        for index, block in enumerate(self.blocks):
            if index == self.equivariant_depth:
                x = self.hand_over(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  (TorchScript)
                x = checkpoint(block, x)
            else:
                x = block(x)
        x = self.norm(x)
        return self._fields(x) if self.ends_equivariant else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool the tokens of `forward_features`, of regular fields their invariants; classify unless `pre_logits`."""
        pool = self.global_pool
        if self.reads_fields:
            x = x[:, :1] if pool == "token" else x
            x = x.unflatten(2, (self.fields, self.order)).permute(3, 0, 1, 2)  # [|G|, B, N, fields]
            x = self.hand_over(self.to_irreps(x).permute(1, 2, 0, 3).flatten(2))  # [B, N, features]
        x = global_pool_nlc(x, pool_type=pool, num_prefix_tokens=self.num_prefix_tokens)
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
        """What blocks return: regular fields of the equivariant ones, ordinary channels of the others.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n blocks if an int, all if None, else those listed.
            return_prefix_tokens: give each as (patches, prefix tokens).
            norm: apply the last norm, which only fits what the last blocks return.
            stop_early: skip the blocks after the last one asked for.
            output_fmt: 'NCHW' for maps [B, d, H / p, W / p], 'NLC' for tokens [B, N, d].
            intermediates_only: return the list alone.

        Returns:
            The tokens behind the last block computed, normed where the norm fits, and the list; or the list.

        Raises:
            ValueError: an unknown format; `norm` for an equivariant block in front of ordinary ones; maps of what
                `patch_drop_rate` has left over.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} does not exist for this model: use 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        if norm and not self.ends_equivariant and min(take_indices) < self.equivariant_depth:
            raise ValueError(
                f"norm=True is for blocks {self.equivariant_depth} to {len(self.blocks) - 1}, whose tokens the last "
                f"norm is made for, but block {min(take_indices)} is equivariant: use norm=False"
            )
        if self.training and output_fmt == "NCHW" and isinstance(self.patch_drop, PatchDropout):
            raise ValueError(
                f"patch_drop_rate {self.patch_drop.prob} leaves no whole map in training: use output_fmt='NLC', or "
                "eval()"
            )
        size = x.shape[2], x.shape[3]
        x = self._embed(x)
        taken, fields = [], True
        for index, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            if index == self.equivariant_depth:
                x, fields = self.hand_over(x), False
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if index in take_indices:
                y = self.norm(x) if norm else x
                taken.append(self._fields(y) if fields else y)
        height, width = self.patch_embed.dynamic_feat_size(size)
        prefix = [y[:, : self.num_prefix_tokens] for y in taken]
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            taken = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in taken]  # [B, d, h, w]
        if return_prefix_tokens:
            taken = list(zip(taken, prefix, strict=True))
        if intermediates_only:
            return taken
        x = self.norm(x) if fields == self.ends_equivariant else x
        return (self._fields(x) if fields else x), taken

    @torch.jit.unused
    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` as DINO calls it: tokens, or maps with `reshape`."""
        output_fmt = "NCHW" if reshape else "NLC"
        return list(self.forward_intermediates(x, n, return_prefix_tokens, norm, False, output_fmt, True))

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks after the last of `indices`, and the head; returns the indices that stay.

        Norm and head also go where the blocks they were made for do, all ordinary ones.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        lost = not self.ends_equivariant and max_index < self.equivariant_depth
        if prune_norm or lost:
            self.norm = nn.Identity()
        self.ends_equivariant = self.ends_equivariant or lost
        if prune_head or lost:
            if self.ends_equivariant:
                self.hand_over = nn.Identity()  # it stands in front of blocks or a head that are gone
            self.reads_fields = False
            self.head_hidden_size = self.embed_dim
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: EquivariantViT) -> dict[str, torch.Tensor]:
    """The state dict for `model`, its position map resized where the model is made for another image size."""
    tiles = state_dict.get("pos_embed")
    if tiles is None or tiles.shape[:2] != model.pos_embed.shape[:2] or tiles.shape == model.pos_embed.shape:
        return state_dict
    return {**state_dict, "pos_embed": resize_tiles(tiles, model.group, model.patch_embed.grid_size)}


def _feature_info(index: int, channels: int, patch_size: int, group: str) -> dict[str, Any]:
    """timm's description of what a block returns, with its number of fields and the group they belong to."""
    fields = channels // irreps_of(group).order
    return dict(module=f"blocks.{index}", num_chs=channels, reduction=patch_size, num_fields=fields, group=group)


def _row(text: str, keywords: dict[str, Any], tag: str = "", cfg: dict[str, Any] | None = None) -> Variant:
    """A row of the table: the docstring, keywords of `EquivariantViT`, the tag of published weights, further cfg."""
    return Variant(text, keywords, {**_cfg(tag), **(cfg or {})}, tag)


def _cfg(tag: str) -> dict[str, Any]:
    return {
        "num_classes": 1000,
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
HYBRID = "NOT invariant and, behind its first half, NOT equivariant under rotations and reflections (a hybrid)"
FULL = f"all blocks equivariant, {INVARIANT}"
MIRROR = "all blocks equivariant, logits invariant under left-right reflection"
SELF_SUPERVISED = {"num_classes": 0}


def _d1(size: str, patch_size: int = 16) -> dict[str, Any]:
    depth = SIZES[size]["depth"]
    only = {"invariants": "trivial", "equivariant_depth": depth, "equivariant_eps": 1e-6}
    return {**SIZES[size], "group": "d1", "patch_size": patch_size, **only}


VARIANTS: dict[str, Variant] = {
    "d4vit_tiny_patch16_224": _row(f"D4 ViT-Ti/16: {INVARIANT}.", SIZES["tiny"]),
    "d4vit_small_patch16_224": _row(f"D4 ViT-S/16: {INVARIANT}.", SIZES["small"]),
    "d4vit_base_patch16_224": _row(f"D4 ViT-B/16: {INVARIANT}.", SIZES["base"]),
    "d4vit_large_patch16_224": _row(
        f"D4 ViT-L/16 (DeiT III): {INVARIANT}.", {**SIZES["large"], "invariants": "polynomial"}, "deit3_in1k"
    ),
    "d4vit_huge_patch14_224": _row(
        f"D4 ViT-H/14 (DeiT III): {INVARIANT}.",
        {**SIZES["huge"], "patch_size": 14, "invariants": "polynomial"},
        "deit3_in1k",
    ),
    "d4vit_large_patch16_dinov2": _row(
        f"D4 ViT-L/16 (DINOv2), features: {INVARIANT}.", SIZES["large"], "dinov2_in1k", SELF_SUPERVISED
    ),
    "d4vit_huge_patch16_dinov2": _row(
        f"D4 ViT-H/16 (DINOv2), features: {INVARIANT}.", SIZES["huge"], "dinov2_in1k", SELF_SUPERVISED
    ),
    "d4vit_small_patch16_full_224": _row(f"D4 ViT-S/16: {FULL}.", {**SIZES["small"], "equivariant_depth": 12}),
    "d4vit_base_patch16_full_224": _row(f"D4 ViT-B/16: {FULL}.", {**SIZES["base"], "equivariant_depth": 12}),
    "d4hybridvit_large_patch16_224": _row(
        f"Hybrid D4 ViT-L/16 (DeiT III): {HYBRID}.", {**SIZES["large"], "invariants": ""}, "deit3_in1k"
    ),
    "d4hybridvit_huge_patch14_224": _row(
        f"Hybrid D4 ViT-H/14 (DeiT III): {HYBRID}.", {**SIZES["huge"], "patch_size": 14, "invariants": ""}, "deit3_in1k"
    ),
    "d4hybridvit_large_patch16_dinov2": _row(
        f"Hybrid D4 ViT-L/16 (DINOv2), features: {HYBRID}.",
        {**SIZES["large"], "invariants": ""},
        "dinov2_in1k",
        SELF_SUPERVISED,
    ),
    "d4hybridvit_huge_patch16_dinov2": _row(
        f"Hybrid D4 ViT-H/16 (DINOv2), features: {HYBRID}.",
        {**SIZES["huge"], "invariants": ""},
        "dinov2_in1k",
        SELF_SUPERVISED,
    ),
    "d1vit_tiny_patch16_224": _row(f"D1 ViT-Ti/16: {MIRROR}.", _d1("tiny")),
    "d1vit_small_patch16_224": _row(f"D1 ViT-S/16: {MIRROR}.", _d1("small")),
    "d1vit_base_patch16_224": _row(f"D1 ViT-B/16: {MIRROR}.", _d1("base")),
    "d1vit_large_patch16_224": _row(f"D1 ViT-L/16: {MIRROR}.", _d1("large")),
    "d1vit_huge_patch14_224": _row(f"D1 ViT-H/14: {MIRROR}.", _d1("huge", 14)),
    "test_d4vit": _row(
        f"Tiny D4 ViT for tests: {INVARIANT}.",
        {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1.0},
        "digits",
        digits_cfg("test_d4vit", 64),
    ),
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build `name` through timm; see `EquivariantViT` for the keywords, all of which may be overridden."""
    build = partial(
        build_model_with_cfg,
        EquivariantViT,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
    )
    return build_pretrained(build, name, **kwargs) if pretrained else build(name, pretrained, **kwargs)


register_family(__name__, EquivariantViT, _create, VARIANTS)
