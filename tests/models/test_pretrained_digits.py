"""The models trained on digits: they load without a network, read held-out digits, and are invariant."""

import re
import socket
from collections.abc import Callable
from functools import partial
from importlib.resources import files

import pytest
import timm
import torch
import torch.nn as nn
from safetensors import safe_open

from equivision_timm.cli.demo import classify, load_digits, turn

QUARTER, MIRROR = partial(torch.rot90, dims=(-2, -1)), partial(torch.flip, dims=(-1,))
NAMES = ("test_c8resnetaf", "test_c8resnet", "test_d4resnet", "test_c1resnet")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs) -> None:
        raise AssertionError("packaged weights need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _pretrained(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def _images(count: int) -> torch.Tensor:
    """[count, 3, 65, 65], digits of all classes."""
    digits, _ = load_digits()
    return turn(digits[:: len(digits) // count][:count], 0, 65).expand(-1, 3, -1, -1)


@torch.inference_mode()
def _change(model: nn.Module, move: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """max |f(move(x)) - f(x)| over the logits of 20 digits."""
    images = _images(20)
    return (model(move(images)) - model(images)).abs().max().item()


def test_package_carries_small_files() -> None:
    folder = files("equivision_timm") / "digits"
    sizes = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    models = (*NAMES, "test_c1resnet_rotated", "test_d4vit", "test_d4convnext")
    assert set(sizes) == {"README.md", "held_out.safetensors", *(f"{name}.safetensors" for name in models)}
    assert max(sizes.values()) < 1_000_000
    assert "CC BY-SA 3.0" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_reads_held_out_upright_digits(name: str) -> None:
    digits, labels = load_digits()
    assert torch.bincount(labels).tolist() == [50] * 10
    accuracy = (classify(_pretrained(name), digits, 0).argmax(1) == labels).double().mean().item()
    assert accuracy > 0.95
    with safe_open(files("equivision_timm") / "digits" / f"{name}.safetensors", "pt") as file:
        reported = float(re.match(r"0\.\d+", file.metadata()["upright_accuracy"])[0])  # of twice as many digits
    assert accuracy == pytest.approx(reported, abs=0.02)


@pytest.mark.parametrize("name", ["test_c8resnetaf", "test_c8resnet", "test_d4resnet"])
def test_quarter_turns_change_nothing(name: str) -> None:
    model = _pretrained(name)
    assert _change(model, QUARTER) < 1e-4
    digits, labels = load_digits()
    right = classify(model, digits[::5], 0).argmax(1) == labels[::5]
    for degrees in (90, 180, 270):
        assert torch.equal(classify(model, digits[::5], degrees).argmax(1) == labels[::5], right)


def test_the_alias_free_network_reads_every_angle() -> None:
    """Trained upright; the control is its sister, which is equivariant under quarter turns only."""
    digits, labels = load_digits()
    least = {}
    for name in ("test_c8resnetaf", "test_c8resnet"):
        model = _pretrained(name)
        right = [classify(model, digits, angle).argmax(1) == labels for angle in (0, 30, 45, 60)]
        least[name] = min(part.double().mean().item() for part in right)
    assert least["test_c8resnetaf"] > 0.9
    assert least["test_c8resnet"] < least["test_c8resnetaf"] - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_tags_channels_and_heads(name: str) -> None:
    assert f"{name}.digits" in timm.list_pretrained("test_*")
    images, whole = _images(4), _pretrained(name)
    expected, features = whole(images), whole.forward_features(images)
    assert torch.equal(_pretrained(f"{name}.digits")(images), expected)
    assert not torch.equal(timm.create_model(name).eval()(images), expected)
    assert (_pretrained(name, in_chans=1)(images[:, :1]) - expected).abs().max() < 1e-4
    other = _pretrained(name, num_classes=5)
    assert other(images).shape == (4, 5)
    assert torch.equal(other.forward_features(images), features)
    levels = _pretrained(name, features_only=True)(images)
    assert len(levels) == 5
    assert torch.equal(levels[-1], features)
