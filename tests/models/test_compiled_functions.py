"""PyTorch's transforms of a model inside `torch.compile`, and strict export: as of timm's own network."""

import os

import pytest
import timm
import torch
from support.compiled_functions import FUNCTIONS, X, largest_differences
from support.fresh_process import in_fresh_process

import equivision_timm  # noqa: F401  registers the models

SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("test_resnet", marks=SLOW), "test_c8resnet"])  # the control first
@pytest.mark.parametrize("function", [pytest.param(f, marks=SLOW if "images" in f else ()) for f in FUNCTIONS])
def test_transforms_inside_compile(name, function):
    """Each in a process of its own: the assertion in PyTorch that forward mode may meet, for timm's network too,
    makes what is compiled after it fail."""
    differences = in_fresh_process(os.environ, largest_differences, name, function)
    if function == "jvp" and isinstance(differences, str):
        assert "INTERNAL ASSERT FAILED" in differences  # PyTorch's own: no result, instead of a wrong one
        return
    assert differences
    assert all(difference < 1e-4 for difference in differences.values()), differences  # NaN fails, too


@pytest.mark.parametrize("train", [False, True])
def test_strict_export(train):
    model = timm.create_model("test_c8resnet", num_classes=3).train(train)
    program = torch.export.export(model, (X,), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(X), model(X), rtol=1e-4, atol=1e-5)
    assert not any("equivision" in str(node.target) for node in program.graph.nodes)  # runs without this package
