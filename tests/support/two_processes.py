"""A script in two processes, forks of one that has PyTorch loaded."""

import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor

import torch.distributed as dist

from support.fresh_process import context

__all__ = ["run_in_two"]


def run_in_two(script: str, argument: str) -> None:
    """Run the text of a script, which calls `dist.init_process_group("gloo")`, with one argument."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        runs = [pool.submit(_run, script, argument, rank, port) for rank in range(2)]
        errors = [run.exception() for run in runs]
    assert errors == [None, None], errors


def _run(script: str, argument: str, rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv[1:] = [argument]
    try:
        exec(script, {})
        dist.barrier()
    finally:
        dist.destroy_process_group()  # also ends the other process if this one failed
