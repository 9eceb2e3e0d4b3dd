"""Whether a module is just what its class says, so that its `forward` may be computed in another way."""

from types import MethodType

import torch.nn as nn
from timm.layers import DropBlock2d, DropPath
from torch.nn.modules import module as torch_module

from equivision_timm.layers.strategies.context import leaves_python

__all__ = ["is_stock", "no_global_hooks", "remember"]


def is_stock(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether `module` is of exactly one of `classes`, and nobody would see that its `forward` is not called.

    Not so for subclasses (parametrised modules are of one), with hooks, with a method replaced on the instance or on
    the class, or compiled.
    """
    return (
        type(module) in classes
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not any(name in module.__dict__ for name in ("forward", "_call_impl", "__call__"))
        and type(module.forward) is MethodType  # torch.compile finds none of these in `__dict__`
        and module._compiled_call_impl is None
        and _is_unpatched(type(module))
    )


def no_global_hooks() -> bool:
    """Whether no hook is registered for all modules."""
    return not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks


def _methods(cls: type[nn.Module]) -> tuple:
    return cls.forward, cls.__call__


def _is_unpatched(cls: type[nn.Module]) -> bool:
    forward, call = _METHODS[cls]
    return cls.forward is forward and (cls.__call__ is call or leaves_python())  # torch.export replaces `__call__`


_METHODS: dict[type[nn.Module], tuple] = {}


def remember(*classes: type[nn.Module]) -> None:
    """Take the methods of `classes` as they are now for theirs; `is_stock` takes no other classes."""
    _METHODS.update({cls: _methods(cls) for cls in classes})


remember(nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.Sequential, nn.MaxPool2d, DropPath, DropBlock2d)
