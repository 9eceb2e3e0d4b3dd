"""Low pass before a stride: removes the frequencies that the coarser grid cannot represent.

Otherwise they are aliased, and aliases do not rotate with the image. The filter is binomial,
[1, 4, 6, 4, 1] / 16 along each axis for five taps; it looks the same from all sides of the square. A stride of 2 keeps
the outermost pixels on both sides of an odd length. Of an even length it would keep one of them only, and rotations by
90 degrees and reflections would not be exact; there the filter takes one tap more, [1, 5, 10, 10, 5, 1] / 32, and its
centres lie between the pixels, as far from one border as from the other:

    y[i] = sum_k b_k x[2 i + k - 2],   k = 0 ... 4 + e,   i = 0 ... (n - 1 - e) / 2,   e = 1 - n mod 2

Source: R. Zhang, Making Convolutional Networks Shift-Invariant Again (2019).
"""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module

from equivision_timm.constants import constant, constant_like
from equivision_timm.errors import check_choice
from equivision_timm.torch_state import has_static_value, is_channels_last, leaves_python, needs_plain_operations

__all__ = ["Blur2d", "get_aa_layer"]


class Blur2d(nn.Module):
    """Binomial low pass of every channel by itself, then the stride: [B, C, H, W] -> [B, C, H', W'].

    H' = (H - 1) // stride + 1, as for a convolution with padding. Along the axes of `even`, an even length takes one
    tap more: H' = H / 2 for stride 2, H - 1 for stride 1, which is for a layer that strides next and wants an odd
    length. The filter is a constant: no parameter, no entry of the state dict.

    Args:
        taps: of the filter along each axis, 3, 5 or 7; or 1, which only averages the two neighbours of an even length.
        stride: of the output.
        padding: beyond the border, 'zeros' or 'reflect', in the sense of `nn.Conv2d`.
        even: the axes (height, width) with one tap more for an even length, those that the group reverses; for stride
            1 or 2.
    """

    def __init__(
        self, taps: int = 5, stride: int = 2, padding: str = "zeros", even: tuple[bool, bool] = (False, False)
    ) -> None:
        super().__init__()
        check_choice("taps", taps, (1, 3, 5, 7))
        check_choice("padding", padding, ("zeros", "reflect"))
        self.taps = taps
        self.stride = stride
        self.padding = padding
        self.even = even

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        border = self.taps // 2
        if self.padding == "reflect":
            x, border = _reflect(x, border), 0
        return _blur(x, self.taps, self.stride, border, self.even)

    def extra_repr(self) -> str:
        return f"taps={self.taps}, stride={self.stride}, padding={self.padding!r}, even={self.even}"


register_notrace_module(Blur2d)  # one node where timm traces a model for its features


@torch.fx.wrap  # depends on the memory format: one node in a graph of torch.fx
def _reflect(x: torch.Tensor, border: int) -> torch.Tensor:
    """[B, C, H + 2 border, W + 2 border], what lies beyond the border reflected; in the memory format of x."""
    if not torch.jit.is_scripting() and is_channels_last(x):
        pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C], contiguous; to PyTorch B volumes of H x W x C
        return F.pad(pixels, [0, 0, border, border, border, border], mode="reflect").permute(0, 3, 1, 2)
    return F.pad(x, [border, border, border, border], mode="reflect")


@torch.fx.wrap  # depends on sizes and the memory format: one node in a graph of torch.fx
def _blur(x: torch.Tensor, taps: int, stride: int, border: int, even: tuple[bool, bool]) -> torch.Tensor:
    if torch.jit.is_scripting():
        rows, columns = _taps(x, taps, even)
        filters = torch.outer(torch.tensor(_binomial(rows)), torch.tensor(_binomial(columns))).to(x)  # exact in float32
        return F.conv2d(x, filters.expand(x.shape[1], 1, rows, columns), None, stride, border, groups=x.shape[1])
    else:
        if any(even) and (torch.jit.is_tracing() or not all([has_static_value(length) for length in x.shape[2:]])):
            return _blur_any_length(x, taps, stride, border, even)
        rows, columns = _taps(x, taps, even)
        if rows == columns == stride == 1:
            return x
        filters = constant_like(x, _filter, rows, columns).expand(x.shape[1], 1, rows, columns)
        few = x.shape[1] < 8 and x.device.type == "cpu" and x.is_contiguous()
        if few and not leaves_python() and not needs_plain_operations(x):  # PyTorch's is slow but for channels-last
            x = x.contiguous(memory_format=torch.channels_last)
            return F.conv2d(x, filters, None, stride, border, groups=x.shape[1]).contiguous()
        return F.conv2d(x, filters, None, stride, border, groups=x.shape[1])


def _taps(x: torch.Tensor, taps: int, even: tuple[bool, bool]) -> tuple[int, int]:
    """The taps along the height and the width of x."""
    return taps + int(even[0] and x.shape[2] % 2 == 0), taps + int(even[1] and x.shape[3] % 2 == 0)


def _blur_any_length(x: torch.Tensor, taps: int, stride: int, border: int, even: tuple[bool, bool]) -> torch.Tensor:
    """`_blur` for a graph of all heights and widths: always taps + 1 taps, the last one zero for an odd length."""
    odd = torch.tensor([*_binomial(taps), 0.0], dtype=x.dtype, device=x.device)
    longer = torch.tensor(_binomial(taps + 1), dtype=x.dtype, device=x.device)
    extra = [1 - x.shape[axis] % 2 if even[axis - 2] else 0 for axis in (2, 3)]  # e, an integer of the graph
    rows, columns = (odd + (longer - odd) * e for e in extra)  # [taps + 1] each
    filters = (rows[:, None] * columns).expand(x.shape[1], 1, taps + 1, taps + 1)
    x = F.pad(x, [border, border + 1, border, border + 1])
    x = F.conv2d(x, filters, None, stride, groups=x.shape[1])
    if stride == 1:  # to the length n - e, by indices, since export refuses such slices
        for axis in (2, 3):
            if even[axis - 2]:
                odd_length = (x.shape[axis] - 1) // 2 * 2 + 1  # as exporters simplify it after the next stride
                x = x.index_select(axis, torch.arange(odd_length, device=x.device))
    return x


def _binomial(taps: int) -> list[float]:
    """b_k = (taps - 1 choose k) / 2^(taps - 1), k = 0 ... taps - 1; by Pascal's triangle, for TorchScript."""
    row = [1.0]
    for _ in range(taps - 1):
        row = [0.0] + row + [0.0]  # noqa: RUF005  for TorchScript
        row = [(row[k] + row[k + 1]) / 2 for k in range(len(row) - 1)]
    return row


@constant
def _filter(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    column, row = (torch.tensor(_binomial(taps), dtype=torch.float64) for taps in (rows, columns))
    return torch.outer(column, row).to(device, dtype)  # [rows, columns]


_AA_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "blur": partial(Blur2d, taps=3, padding="reflect"),  # timm's BlurPool2d
    "blurpc": partial(Blur2d, taps=3),  # timm's with constant padding
    "blur5": partial(Blur2d, taps=5),  # far less aliasing
}


def get_aa_layer(aa_layer: str) -> Callable[..., nn.Module]:
    """The factory of an anti-aliasing layer, called with `stride=`.

    `aa_layer` is timm's 'blur' (three taps, reflected border) or 'blurpc' (zeros), in timm's spellings, or 'blur5'
    (five taps, zeros). timm's 'avg' is not equivariant: 2 x 2 pixels cover one border of an odd size and not the other.
    """
    name = re.sub("[_-]|pool", "", str(aa_layer).lower())
    check_choice("aa_layer", name, _AA_LAYERS)
    return _AA_LAYERS[name]
