"""Patches as tokens: equivariant maps made of tiles, for kernels of patches and for position maps.

A map of irreps coefficients K [|G|, ..., H, W] over a grid is equivariant if moving its pixels by g and acting with g
on its blocks gives K again. A tile is a quarter of the grid, its top left corner (half of it for groups of two
elements, all of it for the trivial one), and every map is a sum over the group of moved tiles w:

    K_i = sum_g s_i(g) g.w_i for the one-dimensional irreps i,    K_a,b = sum_g P_a0(g) g.w_b for row a of E in D4,

b being its multiplicity; E of complex type (C4) takes two tiles, K_a = sum_g P_a0(g) g.w_0 + P_a1(g) g.w_1. Where a
reflection maps the tile onto itself (D4) the one-dimensional irreps only use the part of w that it leaves unchanged;
these are the parameters of octic-vits (https://github.com/davnords/octic-vits), whose weights fit unchanged.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import PatchEmbed, register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import move_pixels
from equivision_timm.layers.conv import constant_conv, is_watched
from equivision_timm.layers.irreps import Irreps, irreps_of, plane_matrices
from equivision_timm.torch_state import has_sizes

__all__ = ["EquivariantPatchEmbed", "TileConv2d", "UnfoldTiles", "resize_tiles", "tile_count", "tile_size"]


def tile_count(group: str) -> int:
    """Number of tiles of a field: one for each one-dimensional irrep, two for E."""
    return irreps_of(group).ones + irreps_of(group).rows


def tile_size(height: int, width: int, group: str) -> tuple[int, int]:
    """Height and width of the tiles of a map of height x width; raises ValueError if tiles do not divide it."""
    irreps = irreps_of(group)
    down, right = _tiles_per_side(irreps)
    if height % down or width % right or (irreps.rows and height != width):
        needed = "square and even" if down == 2 else "even"
        raise ValueError(f"a grid of {height} x {width} has no tiles for group {group!r}: its sides must be {needed}")
    return height // down, width // right


def _tiles_per_side(irreps: Irreps) -> tuple[int, int]:
    return (2 if irreps.order > 2 else 1), (2 if irreps.order > 1 else 1)


@constant
def _coupling(group: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[|G|, |G| * tile_count]: the weight of tile n moved by g in block i, column g * tile_count + n."""
    irreps = irreps_of(group)
    ones, rows, copies = irreps.ones, irreps.rows, irreps.multiplicity
    weights = torch.zeros(irreps.order, irreps.order, tile_count(group), dtype=torch.float64)  # [block, g, tile]
    for i, signs in enumerate(irreps.group.fourier_matrix()[:ones].sign()):
        weights[i, :, i] = signs
    for a in range(rows):
        for b in range(rows):
            block, column = (ones + 2 * a + b, 0) if copies == 2 else (ones + a, b)
            weights[block, :, ones + b] = plane_matrices(irreps.group)[:, a, column]
    return weights.flatten(1).to(device, dtype)


class UnfoldTiles(nn.Module):
    """Tiles [tile_count, ..., h, w] -> the map [|G|, ..., H, W]."""

    def __init__(self, group: str) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.group = group
        down, right = _tiles_per_side(irreps)
        self.down: int = down
        self.right: int = right
        # Lists, but torch.jit warns if the annotation says so
        self.quarter_turns: Sequence[int] = [irreps.group.quarter_turns(g) or 0 for g in range(irreps.order)]
        self.reflects: Sequence[bool] = [g >= irreps.group.rotations for g in range(irreps.order)]
        self._weights = _coupling(group, torch.float64, torch.device("cpu"))  # not state; for TorchScript

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        h, w = tiles.shape[-2], tiles.shape[-1]
        corner = F.pad(tiles, [0, (self.right - 1) * w, 0, (self.down - 1) * h])  # [n, ..., H, W]
        moved = []
        for turns, reflect in zip(self.quarter_turns, self.reflects):  # noqa: B905  (TorchScript knows no strict)
            moved.append(move_pixels(corner, turns, reflect))
        stacked = torch.stack(moved)  # [|G|, n, ..., H, W]
        values = stacked.flatten(0, 1).flatten(1)  # [|G| * n, ... * H * W]
        if torch.jit.is_scripting():
            blocks = torch.matmul(self._weights.to(values), values)
        else:
            blocks = _couple(values, self.group)
        return blocks.unflatten(1, stacked.shape[2:])


register_notrace_module(UnfoldTiles)  # one node if timm traces a model for its features


@torch.fx.wrap  # reads dtype and device: one node in a graph of torch.fx
def _couple(values: torch.Tensor, group: str) -> torch.Tensor:
    return torch.matmul(constant_like(values, _coupling, group), values)


def resize_tiles(tiles: torch.Tensor, group: str, grid: tuple[int, int]) -> torch.Tensor:
    """Tiles of a position map for another grid: the map is unfolded, resized by bicubic interpolation, folded again."""
    irreps = irreps_of(group)
    down, right = _tiles_per_side(irreps)
    whole = UnfoldTiles(group)(tiles.double())  # [|G|, fields, H, W]
    whole = F.interpolate(whole, size=grid, mode="bicubic", align_corners=False)
    resized = whole[: tile_count(group), ..., : grid[0] // down, : grid[1] // right].clone()
    resized[: irreps.ones] /= irreps.order // (down * right)  # as many elements map a tile onto itself
    return resized.to(tiles.dtype)


class TileConv2d(nn.Module):
    """Convolution of patches into the irreps basis: [B, in_chans, H, W] -> [B, |G| * fields, H / p, W / p].

    Kernel and stride are p; the p x p kernel of a block is sqrt(d / |G|) times its unfolded tile, d the dimension of
    the irrep, so that a moved image gives moved patches, with the group acting on their blocks. The bias is on the
    trivial irrep.

    Parameters: `weight` [tile_count * fields, in_chans, h, w], four axes, the input second, as timm expects of a first
    convolution; `bias` [fields].
    """

    def __init__(self, in_chans: int, fields: int, patch_size: int, group: str, **dd: Any) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.group = group
        self.fields = fields
        self.patch_size = patch_size
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.tiles: int = tile_count(group)
        shape = self.tiles * fields, in_chans, *tile_size(patch_size, patch_size, group)
        self.weight: nn.Parameter = nn.Parameter(torch.empty(shape, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.unfold: UnfoldTiles = UnfoldTiles(group)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.Conv2d, with the fan-in of a tile; zero bias."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.bias)

    def kernel(self) -> torch.Tensor:
        """The dense kernel [|G| * fields, in_chans, p, p]."""
        blocks = self.unfold(self.weight.unflatten(0, (self.tiles, self.fields)))  # [|G|, fields, in_chans, p, p]
        ones = blocks[: self.ones] * (1 / self.order) ** 0.5
        return torch.cat([ones, blocks[self.ones :] * (2 / self.order) ** 0.5]).flatten(0, 1)

    def channel_bias(self) -> torch.Tensor:
        """The bias of each channel, [|G| * fields]."""
        return F.pad(self.bias, [0, (self.order - 1) * self.fields])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.kernel(), self.channel_bias(), stride=self.patch_size)

    @torch.no_grad()
    @torch.jit.unused
    def fuse(self) -> nn.Module:
        """The plain convolution that computes the same, or itself if watched; for timm's `reparameterize_model`."""
        return self if is_watched(self) else constant_conv(self.kernel(), self.channel_bias(), stride=self.patch_size)

    def extra_repr(self) -> str:
        return f"fields={self.fields}, patch_size={self.patch_size}, group={self.group!r}"


class EquivariantPatchEmbed(PatchEmbed):
    """timm's PatchEmbed with an equivariant convolution: [B, in_chans, H, W] -> [B, H / p * W / p, |G| * fields].

    Without `strict_img_size` [B, H / p, W / p, |G| * fields]. Images of another size than `img_size` or, without
    `strict_img_size`, that patches do not divide raise AssertionError.
    """

    img_size: tuple[int, int]
    patch_size: tuple[int, int]

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        fields: int,
        group: str,
        strict_img_size: bool,
        **dd: Any,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, 1, strict_img_size=strict_img_size, device="meta")
        self.proj: nn.Module = TileConv2d(in_chans, fields, patch_size, group, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _check_patches(x, self.patch_size[0], self.img_size if self.strict_img_size else None)
        x = self.proj(x).permute(0, 2, 3, 1)  # [B, H / p, W / p, |G| * fields]
        return x.flatten(1, 2) if self.strict_img_size else x


def _check_patches(x: torch.Tensor, patch: int, img_size: tuple[int, int] | None) -> torch.Tensor:
    """x, if its pixels are `img_size`, or if patches divide them; torch.compile specialises on sizes in messages."""
    if has_sizes(x):
        height, width = x.shape[2], x.shape[3]
        if img_size is not None and (height != img_size[0] or width != img_size[1]):
            raise AssertionError(
                f"images of {height} x {width} pixels, not {img_size}: resize, or set dynamic_img_size"
            )
        if height % patch != 0 or width % patch != 0:
            raise AssertionError(
                f"images of {height} x {width} pixels, not multiples of the patch, {patch}: resize them"
            )
    return x
