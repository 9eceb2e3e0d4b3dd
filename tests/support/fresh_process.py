"""Functions run in a process of their own: huggingface_hub reads its environment when it is imported.

The processes are forks of one that has only PyTorch loaded, which is what takes long.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torchvision"])


def in_fresh_process(environment, function, *arguments):
    """What `function(*arguments)`, of a module of this package, returns with just these environment variables."""
    variables = {key: str(value) for key, value in environment.items()}
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, variables, function, arguments).result()


def _run(variables, function, arguments):
    os.environ.clear()
    os.environ.update(variables)
    return function(*arguments)
