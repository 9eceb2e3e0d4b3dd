"""The state of PyTorch that decides how a layer is computed: tracing, transforms, special tensors, memory formats."""

import torch

from equivision_timm.torch_internals import FakeTensor, in_transform

__all__ = ["has_sizes", "is_channels_last", "leaves_python", "needs_plain_operations"]


def has_sizes(x: torch.Tensor) -> bool:
    """Whether x has sizes that can be checked: False for a proxy of torch.fx and while torch.jit traces."""
    return isinstance(x, torch.Tensor) and not torch.jit.is_tracing()


@torch.compiler.assume_constant_result  # torch.compile of torch 2.8 would take `is_exporting` for True
def leaves_python() -> bool:
    """Whether a graph is recorded that must run without this package: torch.jit.trace, torch.export, ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def needs_plain_operations(*tensors: torch.Tensor) -> bool:
    """Whether only PyTorch's own operations give correct derivatives here.

    True in `torch.func` transforms, in forward mode, and for tensors with operations of their own (DTensor, ...).
    """
    if in_transform():
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
    """Whether x [B, C, H, W] is in the channels-last format and not contiguous; False where that cannot be asked."""
    if not isinstance(x, torch.Tensor) or leaves_python() or x.is_contiguous() or needs_plain_operations(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)
