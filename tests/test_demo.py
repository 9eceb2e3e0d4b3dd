"""The demo: a true table, a picture that is written whole or not at all, digits that turn without inventing pixels."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import equivision_timm
from equivision_timm.cli import demo
from equivision_timm.cli.main import main
from equivision_timm.errors import InputError

PACKAGE = Path(equivision_timm.__file__).parent
ANGLES = (0, 45, 90, 180)


def test_prints_measured_accuracies_and_draws_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    demo.measure(tmp_path / "demo.png", angles=ANGLES, every=10)
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("L").getcolors()) > 100  # not blank

    digits, labels = (tensor[::10] for tensor in demo.load_digits())
    printed = capsys.readouterr().out
    assert f"{len(labels)} held-out" in printed
    assert re.search("^angle .* test_d4vit .* test_c1resnet ", printed, re.MULTILINE)
    assert f"test_d4vit {len(labels)}. In between" in printed  # the same answer at 0, 90 and 180 degrees
    for angle in ANGLES:
        row = re.search(rf"^ *{angle}°" + r" +([\d.]+)" * len(demo.NETWORKS) + " ", printed, re.MULTILINE)
        for network, figure in zip(demo.NETWORKS, row.groups(), strict=True):
            model = timm.create_model(network.model, pretrained=True).eval()
            model.load_state_dict(load_file(PACKAGE / "digits" / f"{network.file}.safetensors"))
            right = (demo.predict(model, digits, angle, network.turns) == labels).sum().item()
            assert float(figure) == pytest.approx(100 * right / len(labels), abs=0.051)


def test_rivals_are_what_they_are_called() -> None:
    """Averaged: quarter turns change nothing. Trained with rotations: no angle is much worse than another."""
    digits, labels = (tensor[::10] for tensor in demo.load_digits())
    model = timm.create_model("test_c1resnet", pretrained=True).eval()
    assert torch.equal(demo.predict(model, digits, 0, 4), demo.predict(model, digits, 90, 4))
    assert not torch.equal(demo.predict(model, digits, 0), demo.predict(model, digits, 90))
    model.load_state_dict(load_file(PACKAGE / "digits" / "test_c1resnet_rotated.safetensors"))
    right = [(demo.predict(model, digits, angle) == labels).double().mean().item() for angle in (0, 90, 180, 225)]
    assert min(right) > 0.8


def test_swapped_counts_sixes_and_nines_taken_for_each_other() -> None:
    labels = torch.tensor([6, 6, 9, 9, 1])
    predicted = torch.tensor([[6, 6, 9, 9, 1], [9, 6, 9, 9, 6], [6, 6, 6, 6, 1], [9, 9, 6, 6, 9], [8, 0, 1, 2, 3]])
    assert demo._swapped(predicted, labels).tolist() == [0, 25, 50, 100, 0]


def test_upright_digits_look_as_in_timms_evaluation() -> None:
    digits, _ = demo.load_digits()
    config = resolve_data_config(model=timm.create_model("test_c8resnet"))
    prepare = create_transform(**config, is_training=False)
    expected = torch.stack([prepare(Image.fromarray(digit.numpy()).convert("RGB"))[:1] for digit in digits[::50]])
    ours = demo.turn(digits[::50], 0, config["input_size"][-1])
    assert (ours - expected).abs().max() < 0.01  # PIL rounds to 1/255
    assert (ours.flip(-1) - expected).abs().max() > 0.5


def test_quarter_turns_move_pixels_and_corners_stay_black() -> None:
    digits, _ = demo.load_digits()
    assert torch.equal(demo.turn(digits[:5], 90, 65), demo.turn(digits[:5], 0, 65).rot90(1, (-2, -1)))
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    turned = demo.turn(white, 45, 65)[0, 0]
    assert turned[32, 32] == 1
    assert torch.stack([turned[0, 0], turned[0, -1], turned[-1, 0], turned[-1, -1]]).eq(0).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/demo.png", "No such file or directory"),
        ("file/demo.png", "Not a directory"),
        ("demo.xyz", r"no ending of a picture: use one of .*\.png"),
        ("demo", "no ending of a picture"),
        ("folder.png", "is a folder"),
    ],
)
def test_unwritable_picture_is_refused_at_once(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo, "predict", lambda *_: pytest.fail("work was done in vain"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        demo.measure(tmp_path / name)
    assert name in str(error.value)
    assert main(["demo", "--out", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_run_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "predict", interrupt)
    (tmp_path / "demo.png").write_bytes(b"old")
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]
    assert (tmp_path / "demo.png").read_bytes() == b"old"
