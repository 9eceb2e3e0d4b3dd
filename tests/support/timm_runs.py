"""Shared by the tests of timm's scripts: arguments of a small training run, and the results of a script."""

import csv
import json

__all__ = ["IMAGES", "MODEL", "TRAINING", "result", "rows"]

MODEL = ["--model", "c4resnet18_fast", "--model-kwargs", "width=4", "--num-classes", "3"]
IMAGES = ["--img-size", "33", "--crop-pct", "1.0", "-b", "16", "-j", "0", "--device", "cpu"]
# The smallest run that means something: 96 photographs of textures, a narrow network, a few epochs
TRAINING = [
    *(*MODEL, *IMAGES),
    *("--opt", "momentum", "--lr", "0.05", "--sched", "step", "--decay-epochs", "1", "--decay-rate", "0.5"),
    *("--warmup-epochs", "0", "--smoothing", "0", "--color-jitter", "0"),
]


def result(done):
    """The JSON that a script of timm prints after `--result`."""
    return json.loads(done.stdout.split("--result")[-1])


def rows(file):
    """The rows of a CSV file, such as train.py's summary.csv with a row for each epoch."""
    with file.open() as opened:
        return list(csv.DictReader(opened))
