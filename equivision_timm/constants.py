"""Tensors that follow from their names alone, such as a kernel basis: computed once, the same for every caller.

They are no state of a model: nothing can rescale, round, move, broadcast or forget them.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["constant", "constant_like"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def constant(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Cache what `make` returns for its (hashable) arguments; the caller's modes have no part in it.

    `make` runs in a thread of its own, since what PyTorch switches on around a caller (fake tensors, inference mode,
    `torch.func` transforms, tracing, a default device) holds for the caller's thread. `torch.compile` calls it while it
    traces, and takes the result as a constant. What it returns is shared: it must not be changed in place.
    """

    @cache
    def cached(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make, *args, **kwargs).result()

    @torch.compiler.assume_constant_result
    @wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return cached(*args, **kwargs)

    return made


def constant_like(like: torch.Tensor, make: Callable[..., torch.Tensor], *names: Hashable) -> torch.Tensor:
    """The constant `make(*names, dtype, device)` in the type and on the device of `like`.

    A fake tensor where `like` is computed with fake tensors alone; the device it names need not exist.
    """
    if torch.compiler.is_compiling() or not (isinstance(like, FakeTensor) or torch._C._len_torch_dispatch_stack()):
        return make(*names, like.dtype, like.device)
    mode = detect_fake_mode(like)
    if mode is None or mode.allow_non_fake_inputs:
        return make(*names, like.dtype, like.device)
    return mode.from_tensor(make(*names, like.dtype, torch.device("cpu"))).to(like.device)
