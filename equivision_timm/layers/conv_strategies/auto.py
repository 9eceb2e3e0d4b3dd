"""Which strategy is fastest for a layer.

On the CPU, in float32 and float64, that is `native` wherever it can run, but for the trivial group, which has no blocks
to gain from: `expand`. Without a compiler, and in low precision, an estimate from the products and from the numbers
that pass through memory decides between

    expand:          dense products / 54 G/s + 0.45 ns (inputs + outputs)
    block_diagonal:  products in the irreps basis / 40 G/s + 1.1 ns (inputs + outputs) + 3x3: 13 ns outputs of `steer`
                     + 0.1 ms (1x1) or 0.5 ms (3x3) each time some images are worked on

The constants fit about 120 layers of all groups, each measured alone, as `scripts/benchmark.py --layers` does; they
hold for one core of an AMD EPYC with AVX-512, and their ratios, which decide, roughly for others. On other devices
`expand`: many small matrices are no fast path on a GPU, and nothing has been measured there.
"""

import torch

from equivision_timm.constants import constant
from equivision_timm.groups import group_order
from equivision_timm.kernel_bases import Kernel, block_products
from equivision_timm.layers.conv_strategies import native_library

__all__ = ["choose"]


def choose(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    in_fields: int,
    out_fields: int,
    kernel_size: int,
    stride: int,
    group: str,
) -> str:
    """The name of a strategy for an input of `shape` [B, I * |G|, height, width] of regular fields.

    Args:
        shape: of the input.
        device: where it lies.
        dtype: in which to compute.
        in_fields: I.
        out_fields: O.
        kernel_size: 1 or 3.
        stride: of the convolution.
        group: its name.
    """
    order = group_order(group)
    if device.type != "cpu" or order == 1:
        return "expand"
    if dtype in (torch.float32, torch.float64) and native_library.available():
        return "native"
    batch, _, height, width = shape
    out_pixels = ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    pairs = batch * out_pixels * in_fields * out_fields
    numbers = batch * (order * in_fields * height * width + order * out_fields * out_pixels)

    dense = pairs * order**2 * kernel_size**2 / 54e9 + 0.45e-9 * numbers
    blocks = pairs * _products(group, kernel_size) / 40e9 + 1.1e-9 * numbers
    if kernel_size > 1:
        blocks += 13e-9 * batch * order * in_fields * out_pixels
    blocks += (1e-4 if kernel_size == 1 else 5e-4) * max(1, batch * out_pixels / 4096)
    return "block_diagonal" if blocks < dense else "expand"


@constant
def _products(group: str, kernel_size: int) -> int:
    return block_products(Kernel(group, kernel_size))
