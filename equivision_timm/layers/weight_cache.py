"""What is made of weights, kept from call to call as long as they hold the same values."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

__all__ = ["WeightCache"]


class WeightCache:
    """The last value made of some tensors, and copies of them to compare with. Neither copied nor saved."""

    def __init__(self) -> None:
        self.kept: tuple | None = None  # (key, copies, value), replaced as a whole: threads may share a layer

    def get(self, sources: tuple[torch.Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned before, where `sources` and `key` were the same."""
        kept = self.kept
        if kept is None or kept[0] != key or not _equal(sources, kept[1]):
            kept = self.kept = (key, [source.detach().clone() for source in sources], make())
        return kept[2]

    def __deepcopy__(self, memo) -> "WeightCache":
        return WeightCache()

    def __reduce__(self):
        return WeightCache, ()


def _equal(tensors: tuple[torch.Tensor, ...], others: list[torch.Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(*_words(a, b))
        for a, b in zip(tensors, others, strict=True)
    )


def _words(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Many numbers as integers of 64 bits, which PyTorch compares fastest; if they divide into them."""
    if a.numel() < 1 << 14 or not a.is_contiguous() or a.nbytes % 8 or a.storage_offset() * a.itemsize % 8:
        return a, b
    return a.detach().flatten().view(torch.int64), b.flatten().view(torch.int64)
