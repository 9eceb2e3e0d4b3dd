"""What a strategy is: one exact algorithm for a steerable convolution. Here they are registered, by name.

For coefficients w, a bias b of each output field, and K the dense filter of `expand.py`, the definition:

    conv2d(x, w, layer)                                   = K(w) * x                      differentiable
    infer(x, pack(w, b, layer), layer, shortcut, relu)    = act(K(w) * x + b + shortcut)

up to float noise. `pack` depends on the coefficients alone, and its result is used again as long as they stay. A new
strategy is a file with a subclass of `Strategy`, decorated with `register`: the choice of 'auto', the names that a
layer takes, the tests and the columns of the benchmark follow from `STRATEGIES`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from equivision_timm.groups import group_order
from equivision_timm.kernels import Kernel

__all__ = ["STRATEGIES", "Layer", "Strategy", "finish", "register"]


@dataclass(frozen=True)
class Layer:
    """A steerable convolution, for a strategy: all but the coefficients and the size of the maps.

    Attributes:
        kernel: the kernels, with the group and the type of the input.
        in_fields: I, number of input fields.
        out_fields: O, number of output fields, regular ones.
        stride: as in `nn.Conv2d`.
        dilation: as in `nn.Conv2d`; the padding is dilation * (kernel.size // 2).
        dtype: in which to compute; that of x.
        device: where x and the coefficients lie.
        memory_format: of x, `torch.channels_last` or `torch.contiguous_format`.
    """

    kernel: Kernel
    in_fields: int
    out_fields: int
    stride: int = 1
    dilation: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def order(self) -> int:
        """|G|."""
        return group_order(self.kernel.group)

    @property
    def padding(self) -> int:
        """Pixels on each side: stride 1 keeps the size."""
        return self.dilation * (self.kernel.size // 2)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Of the output, for an input of height x width pixels."""
        return (height - 1) // self.stride + 1, (width - 1) // self.stride + 1


class Strategy(ABC):
    """One exact algorithm. Instances hold no state of a layer: one serves all layers.

    Attributes:
        name: what users call it.
        plain_operations: whether it consists of PyTorch's own operations, whose derivatives are right in `torch.func`
            transforms, in forward mode, and for tensors with operations of their own (DTensor, ...).
    """

    name: ClassVar[str]
    plain_operations: ClassVar[bool] = True

    @abstractmethod
    def supports(self, layer: Layer) -> str | None:
        """None, or the reason why it cannot compute `layer` on this machine, and the remedy. Costs nothing."""

    @abstractmethod
    def estimate(self, layer: Layer, shape: tuple[int, ...]) -> float:
        """Seconds of one thread for an input of `shape`, by which 'auto' compares; infinite where nothing is known."""

    @abstractmethod
    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, layer: Layer) -> Any:
        """What `infer` takes.

        Args:
            weight: w [O, I, n_basis, 1], of any type.
            bias: [O], added to each field, or None.
            layer: the layer.
        """

    @abstractmethod
    def infer(
        self, x: torch.Tensor, packed: Any, layer: Layer, shortcut: torch.Tensor | None = None, relu: bool = False
    ) -> torch.Tensor:
        """[B, O * |G|, height', width'] for x [B, I * H, height, width]; then the shortcut is added, and ReLU taken."""

    def conv2d(self, x: torch.Tensor, weight: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The convolution, with gradients for x and `weight`: by default those of `pack` and `infer`."""
        return self.infer(x, self.pack(weight, None, layer), layer)


STRATEGIES: dict[str, Strategy] = {}


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy known by its name, from now on; `del STRATEGIES[name]` makes it unknown again.

    Raises:
        ValueError: the name is taken.
    """
    if strategy.name == "auto" or strategy.name in STRATEGIES:
        raise ValueError(f"there is a conv_strategy {strategy.name!r} already: use another name")
    STRATEGIES[strategy.name] = strategy()
    return strategy


def finish(y: torch.Tensor, shortcut: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """y + shortcut, if there is one, with ReLU, if `relu`; overwrites y."""
    y = y if shortcut is None else y.add_(shortcut)
    return F.relu(y, inplace=True) if relu else y
