"""Split a batch among threads, each of which works on its own images.

PyTorch shares out every single operation, and all threads wait for one another after each; with many short operations
that costs more than it gains, above all beside other processes. Images are independent: one wait for them all.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

__all__ = ["by_images"]

Result = TypeVar("Result")


def by_images(work: Callable[[slice], Result], batch: int, device: torch.device) -> list[Result]:
    """[work(images)] for slices that cover the batch, at the same time on the CPU; in inference mode.

    The parts share PyTorch's number of threads.
    """
    threads = torch.get_num_threads()
    parts = min(threads, batch) if device.type == "cpu" else 1
    edges = [batch * part // parts for part in range(parts + 1)]
    slices = [slice(start, end) for start, end in zip(edges, edges[1:], strict=False)]

    def run(images: slice) -> Result:
        torch.set_num_threads(max(1, threads // parts))  # of this thread
        with torch.inference_mode():
            return work(images)

    if parts == 1:
        with torch.inference_mode():
            return [work(slice(0, batch))]
    try:
        return list(_pool(parts).map(run, slices))
    finally:
        torch.set_num_threads(threads)  # what threads to come start with


@cache
def _pool(parts: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(parts, thread_name_prefix="equivision_timm")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
