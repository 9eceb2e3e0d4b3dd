"""Split a batch into a few images at a time, and these among threads.

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
Workspace = TypeVar("Workspace")


def by_images(
    work: Callable[[list[tuple[slice, Workspace]]], Result],
    make_workspace: Callable[[int], Workspace],
    batch: int,
    at_once: int,
    device: torch.device,
) -> list[Result]:
    """[work(some images), work(others), ...], on the CPU at the same time; in inference mode.

    Args:
        work: takes its share of the batch, pairs of a slice of at most `at_once` images and buffers for as many.
        make_workspace: makes the buffers for n images. Called here and not by the threads: what a thread of its own
            frees goes back to the system, and each page has to be asked for again.
        batch: number of images.
        at_once: how many are worked on together.
        device: where they lie.
    """
    slices = [slice(start, min(start + at_once, batch)) for start in range(0, batch, at_once)]
    threads = torch.get_num_threads()
    parts = max(1, min(threads, len(slices))) if device.type == "cpu" else 1
    edges = [len(slices) * part // parts for part in range(parts + 1)]
    shares = []
    with torch.inference_mode():
        for part in range(parts):
            own = slices[edges[part] : edges[part + 1]]
            workspaces = {n: make_workspace(n) for n in {s.stop - s.start for s in own}}
            shares.append([(s, workspaces[s.stop - s.start]) for s in own])
        if parts == 1:
            return [work(shares[0])]

    def run(share: list[tuple[slice, Workspace]]) -> Result:
        torch.set_num_threads(max(1, threads // parts))  # of this thread
        with torch.inference_mode():
            return work(share)

    try:
        return list(_pool(parts).map(run, shares))
    finally:
        torch.set_num_threads(threads)  # what threads to come start with


@cache
def _pool(parts: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(parts, thread_name_prefix="equivision_timm")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
