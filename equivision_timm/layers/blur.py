"""Low pass before a stride: removes the frequencies that the coarser grid cannot represent.

Otherwise they are aliased, and aliases do not rotate with the image. The filter is binomial,
[1, 4, 6, 4, 1] / 16 along each axis for five taps; it looks the same from all sides of the square, so that rotations by
90 degrees and reflections stay exact at odd sizes.

Source: R. Zhang, Making Convolutional Networks Shift-Invariant Again (2019).
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.torch_state import is_channels_last, leaves_python, needs_plain_operations

__all__ = ["Blur2d", "get_aa_layer"]


class Blur2d(nn.Module):
    """Binomial low pass of every channel by itself, then the stride: [B, C, H, W] -> [B, C, H', W'].

    H' = (H - 1) // stride + 1, as for a convolution with padding: stride 2 keeps the outermost pixels on both sides
    where H is odd. The filter is a constant: no parameter, no entry of the state dict.

    Args:
        taps: of the filter along each axis, 3, 5 or 7.
        stride: of the output.
        padding: beyond the border, 'zeros' or 'reflect', in the sense of `nn.Conv2d`.

    Raises:
        ValueError: an argument that does not exist.
    """

    def __init__(self, taps: int = 5, stride: int = 2, padding: str = "zeros") -> None:
        super().__init__()
        if taps not in (3, 5, 7):
            raise ValueError(f"taps={taps!r} does not exist: use 3, 5 or 7")
        if padding not in ("zeros", "reflect"):
            raise ValueError(f"padding={padding!r} does not exist: use 'zeros' or 'reflect'")
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride={stride!r} does not exist: use a positive integer")
        self.taps = taps
        self.stride = stride
        self.padding = padding
        self._filter = binomial_filter(taps, torch.float64, torch.device("cpu"))  # for TorchScript

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        border = self.taps // 2
        if self.padding == "reflect":
            x, border = _reflect(x, border), 0
        return _blur(x, self._filter, self.taps, self.stride, border)

    def extra_repr(self) -> str:
        return f"taps={self.taps}, stride={self.stride}, padding={self.padding!r}"


register_notrace_module(Blur2d)  # one node where timm traces a model for its features


@torch.fx.wrap  # depends on the memory format: one node in a graph of torch.fx
def _reflect(x: torch.Tensor, border: int) -> torch.Tensor:
    """[B, C, H + 2 border, W + 2 border], what lies beyond the border reflected; in the memory format of x."""
    if not torch.jit.is_scripting() and is_channels_last(x):
        pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C], contiguous; to PyTorch B volumes of H x W x C
        return F.pad(pixels, [0, 0, border, border, border, border], mode="reflect").permute(0, 3, 1, 2)
    return F.pad(x, [border, border, border, border], mode="reflect")


@torch.fx.wrap  # depends on the memory format: one node in a graph of torch.fx
def _blur(x: torch.Tensor, reference: torch.Tensor, taps: int, stride: int, border: int) -> torch.Tensor:
    """A depthwise convolution; on the CPU in the channels-last format, where PyTorch's is several times faster."""
    if torch.jit.is_scripting():
        filters = reference.to(x).expand(x.shape[1], 1, taps, taps)
        return F.conv2d(x, filters, None, stride, border, groups=x.shape[1])
    else:
        filters = constant_like(x, binomial_filter, taps).expand(x.shape[1], 1, taps, taps)
        plain = x.device.type != "cpu" or leaves_python() or needs_plain_operations(x)
        if plain or x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, filters, None, stride, border, groups=x.shape[1])
        x = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, filters, None, stride, border, groups=x.shape[1]).contiguous()


@constant
def binomial_filter(taps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, 1, taps, taps]: b_i b_j, b_k = (taps - 1 choose k) / 2^(taps - 1)."""
    b = torch.tensor([math.comb(taps - 1, k) / 2 ** (taps - 1) for k in range(taps)], dtype=torch.float64)
    return torch.outer(b, b)[None, None].to(dtype=dtype, device=device)


_AA_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "blur": partial(Blur2d, taps=3, padding="reflect"),  # timm's BlurPool2d
    "blurpc": partial(Blur2d, taps=3),  # timm's with constant padding
    "blur5": partial(Blur2d, taps=5),  # far less aliasing
}
_REFUSED = {
    "avg": "the centre of 2 x 2 pixels lies between the pixels, so that no size keeps rotations by 90 degrees exact",
}


def get_aa_layer(aa_layer: str) -> Callable[..., nn.Module]:
    """The factory of an anti-aliasing layer, called with `stride=`.

    Args:
        aa_layer: timm's 'blur' (three taps, reflected border) or 'blurpc' (zeros), in timm's spellings, or 'blur5'
            (five taps, zeros).

    Raises:
        ValueError: an unknown name, or one of timm's whose layer would break equivariance.
    """
    name = re.sub("[_-]|pool", "", aa_layer.lower()) if isinstance(aa_layer, str) else None
    if name in _REFUSED:
        raise ValueError(f"aa_layer {aa_layer!r} is not equivariant ({_REFUSED[name]}): use 'blur' or 'blur5'")
    if name not in _AA_LAYERS:
        raise ValueError(f"unknown aa_layer {aa_layer!r}: use 'blur', 'blurpc' or 'blur5'")
    return _AA_LAYERS[name]
