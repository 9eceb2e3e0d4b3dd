"""What a layer is called with: its input, and whether PyTorch records, transforms or watches the call."""

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = ["check_input", "has_sizes", "inference_only", "is_plain", "leaves_python", "needs_plain_operations"]


def has_sizes(x: torch.Tensor) -> bool:
    """Whether x has sizes that can be checked: not so for a proxy of torch.fx, nor while torch.jit traces.

    What these record leaves this package, so a check would have no place in it.
    """
    return isinstance(x, torch.Tensor) and not torch.jit.is_tracing()


def check_input(x: torch.Tensor, in_fields: int, channels_per_field: int) -> None:
    """Raises ValueError unless x is a batch of maps, [B, in_fields * channels_per_field, H, W], with pixels.

    Not where it has no sizes.
    """
    if not has_sizes(x):
        return
    channels = in_fields * channels_per_field
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"a convolution of {in_fields} fields takes [B, {channels}, H, W], but got {list(x.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"a convolution needs maps of at least 1 x 1 pixels, but got {list(x.shape)}")


@torch.compiler.assume_constant_result  # torch.compile calls it: old versions would take `is_exporting` for True
def leaves_python() -> bool:
    """Whether a graph is recorded that must do without this package."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # torch.compile has entered the transforms that it traces
def _transforms() -> bool:
    """Whether `torch.func` transforms (grad, vmap, jvp, ...) or forward-mode derivatives are under way."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_plain_operations(*tensors: torch.Tensor) -> bool:
    """Whether PyTorch's own operations alone give right derivatives here.

    So it is in `torch.func` transforms, in forward mode, and for tensors with operations of their own (DTensor, ...).
    """
    if _transforms():
        return True
    return not torch.compiler.is_compiling() and not all(isinstance(t, FakeTensor) or is_plain(t) for t in tensors)


def inference_only(*tensors: torch.Tensor) -> bool:
    """Whether nothing but the numbers of the output is wanted: no gradients, no graph, nobody who counts operations."""
    return (
        all(isinstance(t, torch.Tensor) and is_plain(t) and not t.is_meta for t in tensors)  # no proxy of torch.fx
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not leaves_python()
        and not _transforms()
        and not torch._C._len_torch_dispatch_stack()
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a block of numbers whose operations are PyTorch's."""
    dispatch = torch.Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]  missing in PyTorch's stub
    return getattr(type(tensor), "__torch_dispatch__", None) is dispatch and tensor.layout == torch.strided
