"""The strategy of 'auto': the one that `tune` has measured as fastest for a layer on this machine, else a rule.

The rule was measured on 186 layers of all groups, with 1 and 8 images, forward and with gradients, by one thread of a
CPU with AVX-512: its strategy takes 3 to 4 % more time than the fastest in the geometric mean, with and without C code.
"""

from functools import lru_cache

import torch

from equivision_timm.layers.strategies.contract import STRATEGIES, Layer
from equivision_timm.layers.strategies.measured import measured_choice

__all__ = ["choose", "decide", "rule"]

WIDE = 150  # out_fields * (|G| - 1) from which fewer products outweigh further passes through memory


def choose(layer: Layer, shape: tuple[int, ...], training: bool) -> str:
    """The name of a strategy for an input of `shape` [B, I * H, height, width], with gradients or without.

    In torch.compile it is chosen once for each graph, and by the rule if the graph leaves the shape open.
    """
    if torch.compiler.is_compiling() or not type(shape[0]) is type(shape[2]) is type(shape[3]) is int:
        return measured_choice(layer, shape, training) or rule(layer)
    return decide(layer, tuple(shape), training, torch.get_num_threads())


@lru_cache(4096)
def decide(layer: Layer, shape: tuple[int, ...], training: bool, threads: int) -> str:
    """`choose` with constants; `decide.cache_clear()` after a change of the table."""
    return measured_choice(layer, shape, training) or rule(layer)


def rule(layer: Layer) -> str:
    """On a CPU the C code, or without it blocks for wide layers; the definition on other devices.

    The trivial group has no blocks: only the C code for larger kernels saves products there.
    """
    if layer.device.type != "cpu":
        return "expand"
    real = layer.dtype in (torch.float32, torch.float64)
    if real and (layer.order > 1 or layer.kernel.size > 1) and STRATEGIES["native"].supports(layer) is None:
        return "native"
    wide = layer.out_fields * (layer.order - 1) >= WIDE
    return "block_diagonal" if wide and STRATEGIES["block_diagonal"].supports(layer) is None else "expand"
