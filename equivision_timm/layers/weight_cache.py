"""What is made of weights, kept from call to call as long as they hold the same values."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

__all__ = ["WeightCache"]


class WeightCache:
    """The last value made of some tensors, and what tells whether they have changed. Neither copied nor saved.

    By default that is copies of them to compare with. All values are read at each call: so no change, however made,
    meets an old value.
    """

    def __init__(self) -> None:
        # (key, copies, value), replaced as a whole: threads may share it
        self.kept: tuple[Any, ...] | None = None

    def get_by_version(self, sources: tuple[torch.Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """As `get`, on any device, without reading values: by what PyTorch counts, the changes in place, and by where
        the values lie. It does not see changes made behind its back, through `.data`, NumPy or the memory itself."""
        kept = self.kept
        if kept is None or kept[0] != key or not _same_versions(sources, kept[1]):
            before = [(source.detach(), _version(source)) for source in sources]  # held: no other takes their memory
            kept = self.kept = (key, before, make())
        return kept[2]

    def get(self, sources: tuple[torch.Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned before, where `sources` (on the CPU) and `key` were the same.

        What was made while another thread changed the sources is returned, and not kept.
        """
        kept = self.kept
        if kept is None or kept[0] != key or not _equal(sources, kept[1]):
            before = [source.detach().clone() for source in sources]
            kept = (key, before, make())
            self.kept = kept if _equal(sources, before) else None
        return kept[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        return WeightCache()

    def __reduce__(self) -> tuple[type["WeightCache"], tuple[()]]:
        return WeightCache, ()


def _version(tensor: torch.Tensor) -> tuple:
    """Where the values lie, what they are, and how often they were changed; not counted for inference tensors."""
    count = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, count


def _same_versions(tensors: tuple[torch.Tensor, ...], before: object) -> bool:
    return isinstance(before, list) and [_version(t) for t in tensors] == [version for _, version in before]


def _equal(tensors: tuple[torch.Tensor, ...], others: list[torch.Tensor] | tuple) -> bool:
    return (
        isinstance(others, list)
        and len(tensors) == len(others)
        and all(
            a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(tensors, others, strict=True)
        )
    )
