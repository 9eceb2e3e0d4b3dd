"""Which strategy is fastest for a layer: what `tune` has measured here, or else the one with the least estimate.

The estimates are made of products and of the values that pass through memory: those of the maps, of T and of the
weights. Their constants fit 170 layers of all groups, each measured alone, as `scripts/benchmark.py --layers` does.
They hold for one core of an AMD EPYC with AVX2, and their ratios, which decide, roughly for others. On other devices
the definition alone has an estimate: many small matrices are no fast path on a GPU, and nothing was measured there.
"""

import math

from equivision_timm.layers.strategies.contract import STRATEGIES, Layer
from equivision_timm.layers.strategies.measured import measured_choice

__all__ = ["choose", "estimated"]


def choose(layer: Layer, shape: tuple[int, ...], training: bool) -> str:
    """The name of a strategy for an input of `shape` [B, I * H, height, width], with gradients or without.

    In torch.compile it is chosen once for each graph, and by the estimate where a graph leaves the shape open.
    """
    return measured_choice(layer, shape, training) or estimated(layer, shape)


def estimated(layer: Layer, shape: tuple[int, ...]) -> str:
    """The name of the strategy with the least estimate, of those that can compute the layer."""
    best, least = "", math.inf
    for name, strategy in STRATEGIES.items():  # no min(key=...), which torch.compile of torch 2.8 cannot read
        if strategy.supports(layer) is None:
            seconds = strategy.estimate(layer, shape)
            if not best or seconds < least:
                best, least = name, seconds
    return best
