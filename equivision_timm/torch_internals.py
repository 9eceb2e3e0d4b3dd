"""Internals of PyTorch that have no public equivalent. The only file that imports them."""

import torch
import torch.nn as nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor  # go through our operators although they dispatch in Python
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value  # whether torch.compile knows a size

__all__ = ["BatchNorm", "FakeTensor", "has_hooks", "has_static_value", "in_transform"]

BatchNorm = nn.modules.batchnorm._BatchNorm  # of all dimensions, and synchronised


@torch.compiler.assume_constant_result  # torch.compile has entered the transforms that it traces
def in_transform() -> bool:
    """Whether transforms of `torch.func` (grad, vmap, jvp, ...) or forward-mode derivatives are in progress."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has forward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
