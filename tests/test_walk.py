"""The walk of an image: how many files and calls of this package one pass takes."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

import equivision_timm
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import native_library

PACKAGE = Path(equivision_timm.__file__).parent


def walk(function) -> tuple[int, set[str]]:
    """Calls of Python functions of the package, and the files that they are in; the second time, when all is loaded."""
    calls: Counter[str] = Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            calls[frame.f_code.co_filename] += 1

    function()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(calls.values()), set(calls)


def forward(mode: str):
    model = timm.create_model("test_c8resnet").train(mode == "train")
    model = equivision_timm.fuse(model) if mode == "fused" else model
    images = torch.randn(2, 3, 65, 65)

    def run():
        with torch.set_grad_enabled(mode == "train"):
            logits = model(images)
        if mode == "train":
            logits.sum().backward()

    return run


@pytest.mark.skipif(bool(native_library.why_not()), reason=str(native_library.why_not()))
@pytest.mark.parametrize(("mode", "files", "calls"), [("eval", 12, 40), ("train", 12, 40), ("fused", 8, 10)])
def test_the_walk_of_an_image(mode, files, calls):
    convolutions = sum(isinstance(m, SteerableConv2d) for m in timm.create_model("test_c8resnet").modules())
    found, names = walk(forward(mode))
    assert names, "nothing was counted"
    assert found <= calls * convolutions
    assert len(names) <= files, sorted(names)
