"""What the tests of timm's scripts share: the arguments of a small training run, and the result a script prints."""

import json
import subprocess

__all__ = ["TRAINING", "result"]

# The smallest run that means something: 96 photographs of textures, a narrow network, a few epochs
TRAINING = [
    *("--model", "c4resnet18_fast", "--model-kwargs", "width=4", "--num-classes", "3"),
    *("--img-size", "33", "--crop-pct", "1.0", "--device", "cpu", "-b", "16", "-j", "0"),
    *("--opt", "momentum", "--lr", "0.05", "--sched", "step", "--decay-epochs", "1", "--decay-rate", "0.5"),
    *("--warmup-epochs", "0", "--smoothing", "0", "--color-jitter", "0"),
]


def result(done: subprocess.CompletedProcess) -> dict | list:
    """What timm's scripts print after `--result`."""
    return json.loads(done.stdout.split("--result")[-1])
