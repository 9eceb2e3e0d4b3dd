"""Share the pieces of a batch out among threads.

PyTorch shares out every single operation, and all threads wait for one another after each; with many short operations
that costs more than it gains, above all beside other processes. Images are independent: one wait for them all.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

__all__ = ["Piece", "by_pieces"]

Result = TypeVar("Result")
Workspace = TypeVar("Workspace")
Piece = tuple[slice, slice]  # images, output rows


def by_pieces(
    work: Callable[[list[tuple[Piece, Workspace]]], Result],
    make_workspace: Callable[[int, int], Workspace],
    pieces: list[list[Piece]],
    device: torch.device,
) -> list[Result]:
    """[work(some pieces), work(others), ...], on the CPU at the same time; in inference mode.

    Args:
        work: takes its share, pairs of a piece and buffers for it.
        make_workspace: makes the buffers for n images and r rows. Called here and not by the threads: what a thread of
            its own frees goes back to the system, and each page has to be asked for again.
        pieces: what belongs together and stays in one thread.
        device: where the images lie.
    """
    threads = torch.get_num_threads()
    parts = max(1, min(threads, len(pieces))) if device.type == "cpu" else 1
    edges = [len(pieces) * part // parts for part in range(parts + 1)]
    shares = []
    with torch.inference_mode():
        for start, end in pairwise(edges):
            own = [piece for together in pieces[start:end] for piece in together]
            sizes = [tuple(part.stop - part.start for part in piece) for piece in own]
            workspaces = {size: make_workspace(*size) for size in set(sizes)}
            shares.append([(piece, workspaces[size]) for piece, size in zip(own, sizes, strict=True)])
        if parts == 1:
            return [work(shares[0])]

    def run(share: list[tuple[Piece, Workspace]]) -> Result:
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


def share_out(work: Callable[[int, int], Result], count: int) -> list[Result]:
    """[work(0, n), work(n, m), ...] for 0 to before `count`, at the same time, in as many parts as PyTorch has threads.

    The calling thread takes the first part. `work` must let go of Python's lock.
    """
    parts = max(1, min(torch.get_num_threads(), count))
    edges = [count * part // parts for part in range(parts + 1)]
    others = [_pool(parts).submit(work, *own) for own in pairwise(edges[1:])] if parts > 1 else []
    return [work(*edges[:2]), *(other.result() for other in others)]
