"""`equivision-timm predict`: the classes of the model, whatever the files, and nothing is written by halves."""

import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.small_models import save_training
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from equivision_timm.cli.demo import load_digits
from equivision_timm.cli.main import main
from equivision_timm.cli.models import Loaded, load

MODEL = "test_c8resnet"
DEVICE = ["--device", "cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 held-out digits as PNG files in two levels of folders, `LABEL_NUMBER.png`; read only."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits()
    for i in range(0, 500, 25):
        place = folder / ("a" if i % 2 else "b")
        place.mkdir(exist_ok=True)
        Image.fromarray(images[i].numpy()).resize((65, 65)).save(place / f"{labels[i]}_{i}.png")
    return folder


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _expected(model: torch.nn.Module, file: str, **options) -> torch.Tensor:
    """Probabilities [classes], by timm only."""
    transform = create_transform(**resolve_data_config(options, model=model), is_training=False)
    with torch.no_grad():
        return model.eval()(transform(Image.open(file).convert("RGB"))[None]).softmax(1)[0]


def test_digits(digits: Path, capsys: pytest.CaptureFixture) -> None:
    """All files of a folder, in batches that the last does not fill: right classes, timm's probabilities."""
    assert main(["predict", str(digits), "--model", MODEL, "-b", "8", *DEVICE]) == 0
    captured = capsys.readouterr()
    rows = _rows(captured.out)
    assert "20/20" in captured.err
    best = [row for row in rows if row["rank"] == "1"]
    assert {row["file"] for row in best} == {str(path) for path in digits.rglob("*.png")}
    assert sum(Path(row["file"]).name[0] == row["name"] for row in best) >= 18
    model = timm.create_model(MODEL, pretrained=True)
    for first in range(0, len(rows), 5):
        of_one = rows[first : first + 5]
        expected, indices = _expected(model, of_one[0]["file"]).topk(5)
        assert [int(row["index"]) for row in of_one] == indices.tolist()
        assert [float(row["probability"]) for row in of_one] == pytest.approx(expected.tolist(), abs=2e-6)


def test_json_into_a_file(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, out = str(next(digits.rglob("3_*.png"))), tmp_path / "folder" / "out.json"
    arguments = ["predict", file, file, "--model", MODEL, "--topk", "2", "--format", "json", "--out", str(out)]
    assert main([*arguments, *DEVICE]) == 0
    assert capsys.readouterr().out == ""
    (entry,) = json.loads(out.read_text())  # the file was named twice
    assert entry["file"] == file
    assert [row["rank"] for row in entry["classes"]] == [1, 2]
    assert (entry["classes"][0]["index"], entry["classes"][0]["name"]) == (3, "3")


def test_unreadable_files_are_named_and_left_out(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "two\nlines.png").write_bytes(b"no picture")
    file = str(next(digits.rglob("*.png")))
    assert main(["predict", str(tmp_path), file, "--model", MODEL, "--topk", "1", *DEVICE]) == 1
    captured = capsys.readouterr()
    (row,) = _rows(captured.out)
    assert row["file"] == file
    assert "predict: left out: " in captured.err
    assert "two\\nlines.png" in captured.err


# What decides names and number of classes


def test_checkpoint_of_training(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Classes, width, epsilon, image size and crop come from the checkpoint, names from the training folder."""
    for name in ("class10", "class2", "class1"):  # in timm's order, natural, so that class10 comes after class2
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "train" / name / "image.png")
    (tmp_path / "names.txt").write_text("class1\nclass2\nclass10\n", encoding="utf-8-sig")  # as Windows writes it
    spec = save_training(tmp_path, img_size=33, crop_pct=1.0, bn_eps=0.5)
    file = str(next(digits.rglob("*.png")))
    model = timm.create_model(
        "c4resnet18_fast", num_classes=3, width=2, bn_eps=0.5, checkpoint_path=spec.partition("=")[2]
    )
    for options, size, place in (([], 33, "names.txt"), (["--size", "65"], 65, "train")):
        assert main(["predict", file, "--model", spec, "--class-map", str(tmp_path / place), *options]) == 0
        rows = _rows(capsys.readouterr().out)
        expected, indices = _expected(model, file, img_size=size, crop_pct=1.0).sort(descending=True)
        assert [row["name"] for row in rows] == [("class1", "class2", "class10")[i] for i in indices]
        assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=2e-6)


def test_names_of_pretrained_weights_are_not_those_of_a_checkpoint() -> None:
    """Ten classes of digits, or ten of the user's own: the number of classes does not decide."""
    digits, imagenet = timm.create_model(MODEL), timm.create_model("c4resnet18_fast", width=1)

    def names(spec: str, model: torch.nn.Module) -> list[str]:
        return Loaded(spec, model, {}, {}).class_names()

    assert names(MODEL, digits) == list("0123456789")
    assert names(f"{MODEL}=own.pth", digits) == [str(i) for i in range(10)]
    digits.pretrained_cfg["label_names"] = list("abcdefghij")
    assert names(MODEL, digits)[0] == "a"
    assert names(f"{MODEL}=own.pth", digits)[0] == "0"
    assert names("c4resnet18_fast", imagenet)[1] == ImageNetInfo().index_to_description(1)


def test_rectangles_of_the_training(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`train.py --input-size 1 33 49` determines the channels, too; --size replaces height and width."""
    spec = save_training(tmp_path, channels=1, input_size=[1, 33, 49])
    assert load(spec).model.in_chans == 1
    assert load(spec).input_size == (1, 33, 49)
    assert load(spec, 65).input_size == (1, 65, 65)
    assert main(["predict", str(next(digits.rglob("*.png"))), "--model", spec, *DEVICE]) == 0
    assert len(_rows(capsys.readouterr().out)) == 3
