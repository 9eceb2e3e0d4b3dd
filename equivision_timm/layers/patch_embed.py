"""Images -> tokens in the irreps basis, with the interface of timm's PatchEmbed."""

import torch
import torch.nn as nn

from equivision_timm.layers.strategies.context import has_sizes
from equivision_timm.layers.tiles import TileConv2d

__all__ = ["EquivariantPatchEmbed", "check_patches"]


class EquivariantPatchEmbed(nn.Module):
    """Non-overlapping patches as tokens: [B, in_chans, H, W] -> [B, H / p * W / p, |G| * fields].

    Args:
        img_size: height and width in pixels, or both.
        patch_size: p, the side of the patches in pixels.
        in_chans: number of image channels.
        fields: number of fields.
        group: name of the group.
        strict_img_size: take images of `img_size` alone; otherwise of every size that the patch divides.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: a size that the patch does not divide, or a patch that has no tiles.
        AssertionError: at the forward pass, for an image of another size.
    """

    strict_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        fields: int,
        group: str,
        strict_img_size: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = (patch_size, patch_size)
        self.strict_img_size = strict_img_size
        self.proj: TileConv2d = TileConv2d(in_chans, fields, patch_size, group, device=device, dtype=dtype)
        self.set_input_size(img_size)

    @torch.jit.unused
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of this size; raises ValueError where the patch does not divide it."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        p = self.patch_size[0]
        if height < p or width < p or height % p or width % p:
            raise ValueError(
                f"img_size {height} x {width} is no multiple of the patch of {p} x {p} pixels: use, for example, "
                f"{max(1, round(height / p)) * p} x {max(1, round(width / p)) * p}"
            )
        self.img_size: tuple[int, int] = (height, width)
        self.grid_size: tuple[int, int] = (height // p, width // p)
        self.num_patches: int = self.grid_size[0] * self.grid_size[1]

    @torch.jit.unused
    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of the image for one token, per side."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = check_patches(x, self.patch_size[0], self.img_size if self.strict_img_size else None)
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, H / p, W / p] -> [B, N, C]


def check_patches(x: torch.Tensor, patch: int, img_size: tuple[int, int] | None) -> torch.Tensor:
    """x, if its pixels are `img_size`; without one, if patches of `patch` pixels divide them.

    A message that quotes a size would make torch.compile take it for a constant, so each is written where it is raised.

    Raises:
        AssertionError: they do not.
    """
    if not has_sizes(x):
        return x
    height, width = x.shape[2], x.shape[3]
    if img_size is not None and (height != img_size[0] or width != img_size[1]):
        raise AssertionError(
            f"image of {height} x {width} pixels, but the model takes {img_size[0]} x {img_size[1]}: resize the image, "
            "or create the model with dynamic_img_size=True"
        )
    if height % patch != 0 or width % patch != 0:
        raise AssertionError(
            f"image of {height} x {width} pixels is no multiple of the patch, {patch}: resize or crop the image"
        )
    return x
