"""The ViT trained on digits: it loads without a network, reads held-out digits, and is as invariant as it says."""

import csv
import re
from importlib.resources import files

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from equivision_timm.cli.demo import classify, load_digits, turn
from equivision_timm.cli.main import main
from equivision_timm.groups import Group


def test_reads_held_out_digits_in_every_orientation():
    model = timm.create_model("test_d4vit", pretrained=True).eval()
    digits, labels = load_digits()
    upright = classify(model, digits, 0).argmax(1)
    accuracy = (upright == labels).double().mean().item()
    with safe_open(files("equivision_timm") / "digits" / "test_d4vit.safetensors", "pt") as file:
        reported = float(re.match(r"0\.\d+", file.metadata()["upright_accuracy"])[0])  # of twice as many digits
    assert accuracy == pytest.approx(reported, abs=0.02)
    assert accuracy > 0.85
    few = digits[::5]
    for degrees in (90, 180, 270):
        assert torch.equal(classify(model, few, degrees).argmax(1), upright[::5])
    x, group = turn(few[:20], 0, 64).expand(-1, 3, -1, -1), Group.from_name("d4")
    with torch.no_grad():
        logits = [model(group.transform_image(x, g)) for g in group.grid_elements]
    assert max((found - logits[0]).abs().max() for found in logits) < 1e-4
    assert logits[0].std() > 1


def test_the_commands_take_it(tmp_path):
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
