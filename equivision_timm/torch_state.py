"""The state of PyTorch that decides how a layer is computed: tracing, transforms, special tensors, memory formats.

The only file that imports internals of PyTorch, each for want of a public equivalent.
"""

import torch
import torch.nn as nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor  # go through our operators although they dispatch in Python
from torch._subclasses.functional_tensor import FunctionalTensor  # what torch.compile differentiates
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value  # whether torch.compile knows a size

__all__ = [
    "BatchNorm",
    "FakeTensor",
    "FunctionalTensor",
    "has_sizes",
    "has_static_value",
    "is_channels_last",
    "is_watched",
    "leaves_python",
    "mark_static",
    "needs_plain_operations",
    "unrecorded_view",
]

BatchNorm = nn.modules.batchnorm._BatchNorm  # of all dimensions, and synchronised


@torch.compiler.assume_constant_result  # torch.compile has entered the transforms that it traces
def _in_transform() -> bool:
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_watched(module: nn.Module) -> bool:
    """Whether `module` has hooks or a forward of its own, which replacing it would drop."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def has_sizes(x: torch.Tensor) -> bool:
    """Whether x has sizes that can be checked: False for a proxy of torch.fx and while torch.jit traces."""
    return isinstance(x, torch.Tensor) and not torch.jit.is_tracing()


@torch.compiler.assume_constant_result  # torch.compile of torch 2.8 would take `is_exporting` for True
def leaves_python() -> bool:
    """Whether a graph is recorded that must run without this package: torch.jit.trace, torch.export, ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def mark_static(x: torch.Tensor) -> torch.Tensor:
    """x, whose sizes torch.compile will not take for dynamic; torch._dynamo.mark_static without its slow import."""
    x._dynamo_static_indices = set(range(x.ndim))  # pyright: ignore[reportAttributeAccessIssue]
    return x


def needs_plain_operations(*tensors: torch.Tensor) -> bool:
    """Whether only PyTorch's own operations differentiate: in `torch.func`, forward mode, for DTensor and its like."""
    if _in_transform():
        return True
    if torch.compiler.is_compiling():
        return False
    dispatch = torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]  missing in PyTorch's stub
    for tensor in tensors:
        own = getattr(type(tensor), "__torch_dispatch__", None) is not dispatch or tensor.layout != torch.strided
        if own and not isinstance(tensor, FakeTensor):
            return True
    return False


@torch.jit.unused
def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x [B, C, H, W] is in the channels-last format and not contiguous; False if that is not known."""
    if not isinstance(x, torch.Tensor) or leaves_python() or x.is_contiguous() or needs_plain_operations(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


@torch.jit.unused
def unrecorded_view(x: torch.Tensor) -> torch.Tensor:
    """x, alone in its memory, without the record that it is a view: overwriting one costs its gradient two copies."""
    if not isinstance(x, torch.Tensor) or not x.requires_grad:  # no tensor: a proxy of torch.fx
        return x
    return torch.ops.aten._unsafe_view(x, x.shape)
