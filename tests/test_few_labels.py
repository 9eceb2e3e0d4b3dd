"""scripts/few_labels.py: labelled and test pieces share no pixel, all networks see the same, and it learns."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "few_labels.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("few_labels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["few_labels"] = module
    spec.loader.exec_module(module)
    return module


def test_labelled_and_test_pieces_share_no_pixel(script, monkeypatch):
    """Every pixel gets its column as its value, so that a piece says where it comes from."""
    columns = torch.arange(script.SIDE).float().expand(script.SIDE, -1)
    monkeypatch.setattr(script, "photographs", lambda: {"a": columns, "b": columns})
    used = {}
    for part in ("train", "test"):
        pieces, labels = script.windows(part, 40, torch.Generator().manual_seed(0))
        assert labels.tolist() == [0] * 40 + [1] * 40
        used[part] = set(pieces.unique().tolist())
    assert len(used["train"]) > 200
    assert len(used["test"]) > 200
    assert not used["train"] & used["test"]


def test_learns(script):
    """A few steps of the plain network name more upright pieces than one without training."""
    network = script.NETWORKS["plain"]
    trained, untrained = (script.accuracy(script.train(network, 10, 0, steps), 0) for steps in (30, 1))
    assert trained > 40 > untrained  # chance: 14 %
