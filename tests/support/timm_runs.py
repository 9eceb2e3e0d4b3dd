"""Shared by the tests of timm's scripts: arguments of a small training run, and the result that a script prints."""

import json

__all__ = ["IMAGES", "MODEL", "TRAINING", "result"]

MODEL = ["--model", "c4resnet18_fast", "--model-kwargs", "width=4", "--num-classes", "3"]
IMAGES = ["--img-size", "33", "--crop-pct", "1.0", "-b", "16", "-j", "0", "--device", "cpu"]
# The smallest run that means something: 96 photographs of textures, a narrow network, a few epochs
TRAINING = [
    *(*MODEL, *IMAGES),
    *("--opt", "momentum", "--lr", "0.05", "--sched", "step", "--decay-epochs", "1", "--decay-rate", "0.5"),
    *("--warmup-epochs", "0", "--smoothing", "0", "--color-jitter", "0"),
]


def result(done):
    """What a script of timm prints after `--result`."""
    return json.loads(done.stdout.split("--result")[-1])
