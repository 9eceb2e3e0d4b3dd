"""scripts/few_labels.py: labelled and test pieces share no pixel, all networks see the same, and it learns."""

import few_labels
import torch


def test_labelled_and_test_pieces_share_no_pixel(monkeypatch):
    """Every pixel gets its column as its value, which shows the origin of a piece."""
    columns = torch.arange(few_labels.SIDE).float().expand(few_labels.SIDE, -1)
    monkeypatch.setattr(few_labels, "photographs", lambda: {"a": columns, "b": columns})
    used = {}
    for part in ("train", "test"):
        pieces, labels = few_labels.windows(part, 40, torch.Generator().manual_seed(0))
        assert labels.tolist() == [0] * 40 + [1] * 40
        used[part] = set(pieces.unique().tolist())
    assert len(used["train"]) > 200
    assert len(used["test"]) > 200
    assert not used["train"] & used["test"]


def test_learns():
    """A few steps of the plain network classify more upright pieces than one step."""
    network = few_labels.NETWORKS["plain"]
    trained, untrained = (few_labels.accuracy(few_labels.train(network, 10, 0, steps), 0) for steps in (30, 1))
    assert trained > 40 > untrained  # chance: 14 %
