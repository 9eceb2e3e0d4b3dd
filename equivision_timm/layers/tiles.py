"""Maps that the group leaves as they are, made of tiles: kernels of patches and position maps.

A map of irreps coefficients K [|G|, ..., H, W] over a grid is equivariant when moving its pixels by g and acting with g
on its blocks gives K again. A tile is a quarter of the grid, its top left corner (half of it for groups of two
elements, all of it for the trivial one), and every map is a sum over the group of moved tiles w:

    K_i = sum_g s_i(g) g.w_i for the one-dimensional irreps i,    K_a,b = sum_g P_a0(g) g.w_b for row a of E in D4,

b being its multiplicity; E of complex type (C4) takes two tiles, K_a = sum_g P_a0(g) g.w_0 + P_a1(g) g.w_1. Where a
reflection maps the tile onto itself (D4) the one-dimensional irreps only see the part of w that it respects; these are
the parameters of octic-vits (https://github.com/davnords/octic-vits), whose weights fit as they are.
"""

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.layers.irreps import Irreps, irreps_of, plane_matrices, signs

__all__ = ["TileConv2d", "UnfoldTiles", "fold_map", "tile_count", "tile_size"]


def tile_count(group: str) -> int:
    """Number of tiles behind one field: one for each one-dimensional irrep, two for E."""
    irreps = irreps_of(group)
    return irreps.ones + (2 if irreps.rows else 0)


def tile_size(height: int, width: int, group: str) -> tuple[int, int]:
    """Height and width of the tiles behind a map of height x width.

    Raises:
        ValueError: the group does not map the grid onto itself, or the tiles do not divide it.
    """
    irreps = irreps_of(group)
    down, right = _tiles_per_side(irreps)
    if height % down or width % right or (irreps.rows and height != width):
        needed = "square and even" if down * right == 4 else "even"
        raise ValueError(f"a grid of {height} x {width} has no tiles for group {group!r}: its sides must be {needed}")
    return height // down, width // right


def fold_map(grid: torch.Tensor, group: str) -> torch.Tensor:
    """An equivariant map [|G|, ..., H, W] -> tiles [tile_count, ..., h, w] that unfold to it."""
    irreps = irreps_of(group)
    down, right = _tiles_per_side(irreps)
    tiles = grid[: tile_count(group), ..., : grid.shape[-2] // down, : grid.shape[-1] // right].clone()
    tiles[: irreps.ones] /= irreps.order // (down * right)  # as many elements map a tile onto itself
    return tiles


def _tiles_per_side(irreps: Irreps) -> tuple[int, int]:
    return (2 if irreps.order > 2 else 1), (2 if irreps.order > 1 else 1)


@constant
def _coupling(group: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[|G|, |G| * tile_count]: the weight of tile n moved by g in block i, column g * tile_count + n."""
    irreps = irreps_of(group)
    weights = torch.zeros(irreps.order, irreps.order, tile_count(group), dtype=torch.float64)  # [block, g, tile]
    for i, sign in enumerate(signs(irreps.group)):
        weights[i, :, i] = sign
    if irreps.rows:
        matrices = plane_matrices(irreps.group)  # [g, a, b]
        for a in range(2):
            for b in range(2):
                if irreps.multiplicity == 2:
                    weights[irreps.ones + 2 * a + b, :, irreps.ones + b] = matrices[:, a, 0]
                else:
                    weights[irreps.ones + a, :, irreps.ones + b] = matrices[:, a, b]
    return weights.flatten(1).to(device, dtype)


class UnfoldTiles(nn.Module):
    """Tiles [tile_count, ..., h, w] -> the map [|G|, ..., H, W].

    Args:
        group: name of the group.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.group = group
        down, right = _tiles_per_side(irreps)
        self.down: int = down
        self.right: int = right
        # Lists, but torch.jit warns where the annotation says so
        self.quarter_turns: Sequence[int] = [irreps.group.quarter_turns(g) or 0 for g in range(irreps.order)]
        self.reflects: Sequence[bool] = [g >= irreps.group.rotations for g in range(irreps.order)]
        self._weights = _coupling(group, torch.float64, torch.device("cpu"))  # no state: what TorchScript takes along

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        h, w = tiles.shape[-2], tiles.shape[-1]
        corner = F.pad(tiles, [0, (self.right - 1) * w, 0, (self.down - 1) * h])  # [n, ..., H, W]
        moved = []
        for k, reflect in zip(self.quarter_turns, self.reflects):  # noqa: B905  (TorchScript knows no strict)
            moved.append(torch.rot90(corner.flip(-1) if reflect else corner, k, [-2, -1]))
        stacked = torch.stack(moved)  # [|G|, n, ..., H, W]
        values = stacked.flatten(0, 1).flatten(1)  # [|G| * n, ... * H * W]
        if torch.jit.is_scripting():
            blocks = torch.matmul(self._weights.to(values), values)
        else:
            blocks = _couple(values, self.group)
        return blocks.unflatten(1, stacked.shape[2:])


register_notrace_module(UnfoldTiles)  # one node where timm traces a model for its features


@torch.fx.wrap  # asks for type and device: one node in a graph of torch.fx
def _couple(values: torch.Tensor, group: str) -> torch.Tensor:
    return torch.matmul(constant_like(values, _coupling, group), values)


class TileConv2d(nn.Module):
    """Convolution of patches into the irreps basis: [B, in_chans, H, W] -> [B, |G| * fields, H / p, W / p].

    Kernel and stride are p; the p x p kernel of a block is sqrt(d / |G|) times its unfolded tile, d the dimension of
    the irrep, so that a moved image gives moved patches, with the group acting on their blocks. The bias is on the
    trivial irrep.

    Parameters: `weight` [tile_count * fields, in_chans, h, w], four axes, the input second, as timm expects of a first
    convolution; `bias` [fields].

    Args:
        in_chans: number of image channels.
        fields: number of fields.
        patch_size: p, in pixels.
        group: name of the group.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: a group that square patches do not have, or tiles that do not divide the patch.
    """

    def __init__(
        self,
        in_chans: int,
        fields: int,
        patch_size: int,
        group: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.group = group
        self.fields = fields
        self.patch_size = patch_size
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.tiles: int = tile_count(group)
        height, width = tile_size(patch_size, patch_size, group)
        shape = self.tiles * fields, in_chans, height, width
        self.weight: nn.Parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, device=device, dtype=dtype))
        self.unfold: UnfoldTiles = UnfoldTiles(group)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv2d starts, with the fan-in of a tile; no bias."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.bias)

    def kernel(self) -> torch.Tensor:
        """The dense kernel [|G| * fields, in_chans, p, p]."""
        tiles = self.weight.unflatten(0, (self.tiles, self.fields))  # [n, fields, in_chans, h, w]
        blocks = self.unfold(tiles)
        ones = blocks[: self.ones] * (1 / self.order) ** 0.5
        return torch.cat([ones, blocks[self.ones :] * (2 / self.order) ** 0.5]).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = F.pad(self.bias, [0, (self.order - 1) * self.fields])  # [|G| * fields]
        return F.conv2d(x, self.kernel(), bias, stride=self.patch_size)

    def extra_repr(self) -> str:
        return f"fields={self.fields}, patch_size={self.patch_size}, group={self.group!r}"
