"""Tensors that are functions of a layer's arguments only, such as a kernel basis: computed once and shared.

They are neither parameters nor buffers: `to_empty`, `load_state_dict(assign=True)`, or a cast to low precision and
back cannot change them.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

from equivision_timm.torch_state import FakeTensor, mark_static

__all__ = ["constant", "constant_like"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def constant(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: cache what `make` returns, which must not be changed in place.

    `make` runs in a new thread, because modes (fake tensors, inference mode, `torch.func`, tracing, a default device)
    belong to the caller's thread. `torch.compile` calls it while tracing and treats the result as a constant.
    """

    @cache
    def cached(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(make, *args, **kwargs).result()
        if isinstance(result, torch.Tensor):  # torch.compile takes constants of this name, but of other sizes, for one
            mark_static(result)
        return result

    @torch.compiler.assume_constant_result
    @wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return cached(*args, **kwargs)

    return made


def constant_like(like: torch.Tensor, make: Callable[..., torch.Tensor], *names: Hashable) -> torch.Tensor:
    """The constant `make(*names, dtype, device)` as `like`: if that is fake, on a device that need not exist."""
    if torch.compiler.is_compiling() or not isinstance(like, FakeTensor) or like.fake_mode.allow_non_fake_inputs:
        return make(*names, like.dtype, like.device)
    return like.fake_mode.from_tensor(make(*names, like.dtype, torch.device("cpu"))).to(like.device)
