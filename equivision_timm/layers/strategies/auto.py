"""The strategy of 'auto': the one that `tune` has measured as fastest for a layer on this machine, else a rule.

The rule was measured on 186 layers of all groups, with 1 and 8 images, forward and with gradients, by one thread of a
CPU with AVX-512: its strategy takes 3 to 4 % more time than the fastest in the geometric mean, with and without C code.
"""

from functools import lru_cache

import torch

from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.layers.strategies.contract import STRATEGIES, Layer
from equivision_timm.layers.strategies.measured import measured_choice
from equivision_timm.torch_state import has_static_value

__all__ = ["choose", "decide", "rule"]

WIDE = 150  # out_fields * (|G| - 1) from which fewer products outweigh further passes through memory


def choose(layer: Layer, shape: tuple[int, ...], training: bool) -> str:
    """The name of a strategy for an input of `shape` [B, I * H, height, width], with gradients or without.

    In torch.compile it is chosen once for each graph, and by the rule if the graph leaves the shape open.
    """
    fields = layer.kernel.name, layer.in_fields, layer.out_fields, layer.stride, layer.dilation
    values = (*fields, layer.dtype, layer.device, layer.memory_format)  # what torch.compile can take as constants
    if torch.compiler.is_compiling():
        fixed = all([has_static_value(length) for length in shape])  # a list, which torch.compile can read
        return _decide_in_graph(values, tuple(shape) if fixed else (), training)
    fixed = type(shape[0]) is type(shape[2]) is type(shape[3]) is int
    return decide(values, tuple(shape) if fixed else (), training, False, torch.get_num_threads())


@torch.compiler.assume_constant_result
def _decide_in_graph(values: tuple, shape: tuple[int, ...], training: bool) -> str:
    return decide(values, shape, training, True, torch.get_num_threads())


@lru_cache(4096)
def decide(values: tuple, shape: tuple[int, ...], training: bool, compiled: bool, threads: int) -> str:
    """`choose` with constants; `decide.cache_clear()` after a change of the table."""
    layer = Layer(named_kernel(values[0]), *values[1:])
    return measured_choice(layer, shape, training, compiled, threads) or rule(layer)


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
