"""Functions run in a process of their own: huggingface_hub reads its environment when it is imported.

The processes are forks of one that has only PyTorch loaded, which is what takes long.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torchvision"])


class FreshProcess:
    """Starts `function(*arguments)`, of a module of this package, with just these environment variables."""

    def __init__(self, environment: Mapping[str, object], function: Callable, *arguments) -> None:
        variables = {key: str(value) for key, value in environment.items()}
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(sender, variables, function, arguments))
        self.process.start()
        sender.close()

    def result(self):
        """What the function returned."""
        with self.receiver:
            result = self.receiver.recv()
        self._end()
        return result

    def kill(self) -> None:
        self.process.kill()
        self.receiver.close()
        self._end()

    def _end(self) -> None:
        self.process.join()
        self.process.close()


def _run(sender, variables: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(variables)
    sender.send(function(*arguments))


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
