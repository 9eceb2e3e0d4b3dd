"""Exact algorithms for one layer, one a file, behind the contract of `contract.py`.

`expand` is the definition; `block_diagonal` the same in the irreps basis; `native` that in C; `auto` chooses.
"""

from equivision_timm.layers.strategies import expand, block_diagonal, native  # noqa: F401, I001  registers, in this order
from equivision_timm.layers.strategies.contract import STRATEGIES, Layer, Strategy, register

__all__ = ["STRATEGIES", "Layer", "Strategy", "register"]
