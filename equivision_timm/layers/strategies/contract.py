"""The interface of a strategy: one exact algorithm for a steerable convolution, registered by name.

For coefficients w and K the dense filter of `expand.py`, the definition:

    conv2d(x, w, layer) = K(w) * x                                                  differentiable, up to float noise

A new strategy is a file with a subclass of `Strategy`, decorated with `register` and imported in `__init__.py` (or by
your own code). "auto" takes it for a layer only after `tune` has measured it as the fastest.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from equivision_timm.kernels import Kernel

__all__ = ["STRATEGIES", "Layer", "Strategy", "register"]


@dataclass(frozen=True)
class Layer:
    """A steerable convolution as a strategy sees it: everything but the coefficients and the size of the maps."""

    kernel: Kernel
    in_fields: int  # I
    out_fields: int  # O
    stride: int = 1
    dilation: int = 1
    dtype: torch.dtype = torch.float32  # in which to compute
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    memory_format: torch.memory_format = torch.contiguous_format  # of dense filters; channels-last is faster on the CPU

    order: int = field(init=False, repr=False, compare=False)  # |G|
    in_channels: int = field(init=False, repr=False, compare=False)  # I * H
    padding: int = field(init=False, repr=False, compare=False)  # stride 1 keeps the size

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", self.kernel.order)
        of_field = self.order if self.kernel.input_type == "regular" else 1
        object.__setattr__(self, "in_channels", self.in_fields * of_field)
        object.__setattr__(self, "padding", self.dilation * (self.kernel.size // 2))


class Strategy(ABC):
    """One exact algorithm. An instance has no state: it serves all layers."""

    name: ClassVar[str]  # the value of `conv_strategy=`
    # Whether it consists of PyTorch's own operations, whose derivatives are correct in `torch.func` transforms, in
    # forward mode, and for tensors with operations of their own (DTensor, ...)
    plain_operations: ClassVar[bool] = True

    @abstractmethod
    def supports(self, layer: Layer) -> str | None:
        """None, or the reason why it cannot compute `layer` on this machine, with the remedy."""

    @abstractmethod
    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The convolution [B, O * |G|, height', width'], differentiable with respect to x and `weight`.

        Args:
            x: [B, I * H, height, width], of the type `layer.dtype`.
            weight: w [O, I, n_basis, 1]; under autocast of a wider type.
        """


STRATEGIES: dict[str, Strategy] = {}


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available under its name; `del STRATEGIES[name]` removes it."""
    STRATEGIES[strategy.name] = strategy()
    return strategy
