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


def create_pretrained(*models: tuple[str, dict]) -> list[float | str]:
    """For each of the models (name, keywords) the sum of its classifier's bias (0 without one), or the error."""
    return [_create_pretrained(name, keywords) for name, keywords in models]


def _create_pretrained(name: str, keywords: dict) -> float | str:
    import timm

    import equivision_timm  # noqa: F401  (registers the models)

    try:
        model = timm.create_model(name, pretrained=True, **keywords)
    except Exception as error:  # what the test looks at
        return f"{type(error).__name__}: {error}"
    return model.fc.bias.sum().item() if hasattr(model, "fc") else 0.0
