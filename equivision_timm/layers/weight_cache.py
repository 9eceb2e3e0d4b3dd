"""What is made of weights, kept from call to call as long as they hold the same values."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from equivision_timm.layers.conv_strategies.native_library import fingerprint

__all__ = ["WeightCache"]


class WeightCache:
    """The last value made of some tensors, and what tells whether they have changed. Neither copied nor saved.

    That is their fingerprint, or copies of them to compare with where it cannot be taken. All values are read at each
    call: so no change, however made, meets an old value.
    """

    def __init__(self) -> None:
        self.kept: tuple | None = None  # (key, fingerprint or copies, value), replaced as a whole: threads may share it

    def get(self, sources: tuple[torch.Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned before, where `sources` (on the CPU) and `key` were the same."""
        kept, now = self.kept, fingerprint(sources)
        if kept is None or kept[0] != key or not (_equal(sources, kept[1]) if now is None else now == kept[1]):
            before = [source.detach().clone() for source in sources] if now is None else now
            kept = self.kept = (key, before, make())
        return kept[2]

    def __deepcopy__(self, memo) -> "WeightCache":
        return WeightCache()

    def __reduce__(self):
        return WeightCache, ()


def _equal(tensors: tuple[torch.Tensor, ...], others: list[torch.Tensor] | tuple) -> bool:
    return (
        isinstance(others, list)
        and len(tensors) == len(others)
        and all(
            a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(tensors, others, strict=True)
        )
    )
