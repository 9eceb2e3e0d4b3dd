"""The models trained on digits: they load without a network, read held-out digits, and are invariant."""

import csv
import re
import socket
from importlib.resources import files

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from equivision_timm.cli.demo import classify, load_digits, turn
from equivision_timm.cli.main import main

NAMES = ("test_c8resnetaf", "test_c8resnet", "test_d4resnet", "test_c1resnet", "test_d4vit", "test_d4convnext")


def read(model, digits, degrees):
    return classify(model, turn(digits, degrees, model.pretrained_cfg["input_size"][-1]))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("packaged weights need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pretrained(name, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def test_package_carries_small_files():
    folder = files("equivision_timm") / "digits"
    sizes = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    models = (*NAMES, "test_c1resnet_rotated")
    assert set(sizes) == {"README.md", "held_out.safetensors", *(f"{name}.safetensors" for name in models)}
    assert max(sizes.values()) < 1_000_000
    assert "CC BY-SA 3.0" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_reads_held_out_digits_in_every_orientation_of_its_group(name):
    model, (digits, labels) = pretrained(name), load_digits()
    assert torch.bincount(labels).tolist() == [50] * 10
    upright = read(model, digits, 0)
    accuracy = (upright.argmax(1) == labels).double().mean().item()
    assert accuracy > (0.85 if name == "test_d4vit" else 0.95)
    with safe_open(files("equivision_timm") / "digits" / f"{name}.safetensors", "pt") as file:
        reported = float(re.match(r"0\.\d+", file.metadata()["upright_accuracy"])[0])  # of twice as many digits
    assert accuracy == pytest.approx(reported, abs=0.02)
    changes = [(read(model, digits[::5], turns) - upright[::5]).abs().max() for turns in (90, 180, 270)]
    assert min(changes) > 1 if name == "test_c1resnet" else max(changes) < 1e-3
    assert upright.std() > 1


def test_the_alias_free_network_reads_every_angle():
    """Trained upright; the control is its sister, which is equivariant under quarter turns only."""
    digits, labels = load_digits()
    least = {}
    for name in ("test_c8resnetaf", "test_c8resnet"):
        model = pretrained(name)
        right = [read(model, digits, angle).argmax(1) == labels for angle in (0, 30, 45, 60)]
        least[name] = min(part.double().mean().item() for part in right)
    assert least["test_c8resnetaf"] > 0.9
    assert least["test_c8resnet"] < least["test_c8resnetaf"] - 0.1


@pytest.mark.parametrize("name", ["test_c8resnetaf", "test_d4resnet"])
def test_tags_channels_and_heads(name):
    assert f"{name}.digits" in timm.list_pretrained("test_*")
    images, whole = turn(load_digits()[0][::125], 0, 65).expand(-1, 3, -1, -1), pretrained(name)
    expected, features = whole(images), whole.forward_features(images)
    assert torch.equal(pretrained(f"{name}.digits")(images), expected)
    assert not torch.equal(timm.create_model(name).eval()(images), expected)
    assert (pretrained(name, in_chans=1)(images[:, :1]) - expected).abs().max() < 1e-4
    other = pretrained(name, num_classes=5)
    assert other(images).shape == (4, 5)
    assert torch.equal(other.forward_features(images), features)
    levels = pretrained(name, features_only=True)(images)
    assert len(levels) == 5
    assert torch.equal(levels[-1], features)


def test_the_commands_take_a_vit(tmp_path):
    """`verify`, `show` and `rotate-eval`: every digit keeps its class at 90 degrees, with the plain network few do."""
    digits, labels = (tensor[::10] for tensor in load_digits())
    for index, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        folder = tmp_path / "digits" / "validation" / str(label.item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit.numpy()).save(folder / f"{index}.png")
    assert main(["verify", "test_d4vit"]) == 0
    picture = str(next((tmp_path / "digits").rglob("*.png")))
    assert main(["show", picture, "--model", "test_d4vit", "--out", str(tmp_path / "show.png")]) == 0
    assert (tmp_path / "show.png").stat().st_size > 10_000
    models, data = ["test_d4vit", "test_c1resnet"], str(tmp_path / "digits")
    options = ["--angles", "0,90", "-j", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["rotate-eval", "--models", *models, "--data", data, *options]) == 0
    rows = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    agreement = {row["model"]: float(row["agreement"]) for row in rows if row["angle"] == "90"}
    assert agreement["test_d4vit"] == 100 > 50 > agreement["test_c1resnet"]
