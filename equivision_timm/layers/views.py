"""Images and maps under the elements g = r^k f^p of C_n or D_n, n = 1, 2, 4 or 8 rotations.

Quarter turns and reflections are transposes and flips, which ONNX has too; a rotation by 45 degrees is a quarter turn
and one resampling.
"""

import math

import torch
import torch.fx
import torch.nn.functional as F

from equivision_timm.groups import move_pixels

__all__ = ["act", "act_each", "shrink"]


def act(x: torch.Tensor, g: int, n: int, inverse: bool = False) -> torch.Tensor:
    """g x, or g^-1 x, of images or maps x [..., H, W]; H = W unless n <= 2."""
    if inverse:
        x = _rotate(x, -g % n, n, inverse)
        return x.flip(-1) if g >= n else x
    return _rotate(x.flip(-1) if g >= n else x, g % n, n, inverse)


def act_each(x: torch.Tensor, g: torch.Tensor, n: int, inverse: bool = False) -> torch.Tensor:
    """g[b] x[b], or g[b]^-1 x[b], of x [B, C, H, W] under elements g [B]; no branch depends on their values."""
    g = g.view(-1, 1, 1, 1)
    k = (-g if inverse else g).remainder(n)
    if not inverse:
        x = torch.where(g >= n, x.flip(-1), x)
    for step in [4, 2, 1] if inverse else [1, 2, 4]:  # of 360 / n degrees: the bits of k
        if step < n:
            x = torch.where(k // step % 2 == 1, _rotate(x, step, n, inverse), x)
    return torch.where(g >= n, x.flip(-1), x) if inverse else x


@torch.fx.wrap
def _rotate(x: torch.Tensor, k: int, n: int, quarters_first: bool) -> torch.Tensor:
    """x [..., H, W] rotated counter-clockwise by k of n steps."""
    if n > 2 and x.shape[-2] != x.shape[-1]:
        raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} pixels do not fit quarter turns: crop to squares")
    quarters, rest = divmod(4 * k, n)
    if rest and not quarters_first:
        x = _eighth_turn(x)
    x = move_pixels(x, quarters)
    return _eighth_turn(x) if rest and quarters_first else x


def _eighth_turn(x: torch.Tensor) -> torch.Tensor:
    """x [..., n, n] rotated counter-clockwise by 45 degrees, bicubic; beyond the border it is 0.

    Reflections beyond the border would be a strange scene in the corners: they cost a network more than no picture.
    """
    size = x.shape[-1]
    axis = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    right, down = axis[None, :], axis[:, None]
    scale = math.sqrt(0.5) * 2 / size  # cos 45 = sin 45; the borders of the image at -1 and 1
    source = torch.stack([(right - down) * scale, (right + down) * scale], dim=-1)  # [n, n, 2]
    images = x.reshape(-1, x.shape[-3], size, size)
    source = source.expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images, source, mode="bicubic", padding_mode="zeros", align_corners=False).view(x.shape)


def shrink(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [B, C, H, W] -> [B, C, size, size]: bilinear with antialiasing, in single precision as PyTorch has it."""
    return F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True).to(x.dtype)
