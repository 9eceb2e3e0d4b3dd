"""Attributes of timm's models with their types: PyTorch declares those of a module to be tensors or modules."""

from typing import TypeVar

import torch.nn as nn

__all__ = ["attribute"]

Kind = TypeVar("Kind")


def attribute(module: nn.Module, name: str, kind: type[Kind]) -> Kind:
    """The attribute `name` of `module`, which is a `kind`.

    Raises:
        TypeError: there is none, or it is of another type.

    Example:
        >>> attribute(nn.Linear(2, 3), "out_features", int)
        3
    """
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        raise TypeError(f"{name} of a {type(module).__name__} is {value!r}, where {kind.__name__} is needed")
    return value
