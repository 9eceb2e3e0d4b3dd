"""The demo: a true table, a picture, digits that rotate without new pixels."""

import re
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import equivision_timm
from equivision_timm.cli import demo

PACKAGE = Path(equivision_timm.__file__).parent
ANGLES = (0, 45, 90, 180)


def test_table_and_picture(tmp_path: Path, capsys) -> None:
    demo.measure(tmp_path / "demo.png", angles=ANGLES, every=10)
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("L").getcolors()) > 100  # not blank

    digits, labels = (tensor[::10] for tensor in demo.load_digits())
    printed = capsys.readouterr().out
    assert f"{len(labels)} held-out" in printed
    (same,) = (line.split()[1:] for line in printed.splitlines() if line.strip().startswith("same "))
    assert same[:4] == ["100.0"] * 4  # of the equivariant networks the same class at 0, 90 and 180 degrees
    assert float(same[4]) < 50
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # the last line is a path
    for angle in ANGLES:
        row = re.search(rf"^ *{angle}°" + r" +([\d.]+)" * len(demo.NETWORKS) + "$", printed, re.MULTILINE)
        for network, figure in zip(demo.NETWORKS, row.groups(), strict=True):
            model = timm.create_model(network.model, pretrained=True).eval()
            model.load_state_dict(load_file(PACKAGE / "digits" / f"{network.file}.safetensors"))
            size = model.pretrained_cfg["input_size"][-1]
            turned = [demo.turn(digits, angle + 90 * k, size) for k in range(network.rotations)]
            views = [demo.classify(model, images) for images in turned]
            correct = (torch.stack(views).mean(0).argmax(1) == labels).sum().item()
            assert abs(float(figure) - 100 * correct / len(labels)) < 0.051


def test_upright_digits_are_those_of_timms_evaluation() -> None:
    digits, _ = demo.load_digits()
    config = resolve_data_config(model=timm.create_model("test_c8resnet"))
    prepare = create_transform(**config, is_training=False)
    expected = torch.stack([prepare(Image.fromarray(digit.numpy()).convert("RGB"))[:1] for digit in digits[::50]])
    found = demo.turn(digits[::50], 0, config["input_size"][-1])
    assert (found - expected).abs().max() < 0.01  # PIL rounds to 1/255
    assert (found.flip(-1) - expected).abs().max() > 0.5


def test_quarter_turns_permute_pixels_and_corners_are_black() -> None:
    digits, _ = demo.load_digits()
    assert torch.equal(demo.turn(digits[:5], 90, 65), demo.turn(digits[:5], 0, 65).rot90(1, (-2, -1)))
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    rotated = demo.turn(white, 45, 65)[0, 0]
    assert rotated[32, 32] == 1
    assert torch.stack([rotated[0, 0], rotated[0, -1], rotated[-1, 0], rotated[-1, -1]]).eq(0).all()
