"""Pretrained models created in a process of its own: huggingface_hub reads its environment when it is imported.

The processes are forks of one that has only PyTorch loaded, which is what takes long.
"""

import multiprocessing
import os

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision"])


class Client:
    """Starts at once; creates each of `models` [(name, keywords)] with `pretrained=True`."""

    def __init__(self, models: list[tuple[str, dict]], environment: dict[str, str]) -> None:
        self.receiver, sender = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_create, args=(models, environment, sender))
        self.process.start()
        sender.close()

    def results(self) -> list[float | str]:
        """For each model the sum of its classifier's bias (0 without one), or the error."""
        with self.receiver:
            results = self.receiver.recv()
        self.process.join()
        self.process.close()
        return results


def _create(models: list[tuple[str, dict]], environment: dict[str, str], sender) -> None:
    os.environ.clear()
    os.environ.update(environment)
    import timm

    import equivision_timm  # noqa: F401  (registers the models)

    sender.send([_attempt(timm.create_model, name, keywords) for name, keywords in models])


def _attempt(create_model, name: str, keywords: dict) -> float | str:
    try:
        model = create_model(name, pretrained=True, **keywords)
    except Exception as error:  # what the test looks at
        return f"{type(error).__name__}: {error}"
    return model.fc.bias.sum().item() if hasattr(model, "fc") else 0.0
