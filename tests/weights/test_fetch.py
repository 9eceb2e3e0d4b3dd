"""`fetch`: from a file on Google Drive, with gdown replaced by a dictionary, to a model that `create_model` finds."""

import hashlib
import inspect
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from support.equivision_data import to_equivision
from support.reference_data import checkpoint
from support.small_models import narrow

from equivision_timm.cli import fetch as fetch_module
from equivision_timm.cli.fetch import fetch
from equivision_timm.cli.main import main
from equivision_timm.weights import equivision
from equivision_timm.weights.equivision import convert_original
from equivision_timm.weights.released import released
from equivision_timm.weights.signs import known_patterns

gdown = pytest.importorskip("gdown", reason="fetching needs the extra `fetch`")

NAME = "c4resnet18"
DRIVE_ID = released()[NAME].drive_id
MODEL_FILES = [f"{NAME}.equivision_in1k/config.json", f"{NAME}.equivision_in1k/model.safetensors"]


def saved(state_dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original():
    with narrow(NAME):
        yield to_equivision(timm.create_model(NAME).state_dict(), order=4)


@pytest.fixture(scope="module")
def original_file(original):
    return saved(original)


class Drive:
    """`gdown.download`: files by Drive id, or errors to be raised; and the number of downloads."""

    def __init__(self):
        self.files, self.downloads, self.signature = {}, 0, inspect.signature(gdown.download)

    def download(self, **arguments):
        self.signature.bind(**arguments)  # arguments that the installed version has
        content = self.files.get(arguments["id"], gdown.exceptions.DownloadError("not there"))
        if isinstance(content, Exception):
            raise content
        self.downloads += 1
        Path(arguments["output"]).write_bytes(content)


def publish_hash(monkeypatch, sha256):
    """Make `sha256` the known hash of the checkpoint, and the only one."""
    table = {name: replace(entry, sha256=sha256 if name == NAME else None) for name, entry in released().items()}
    monkeypatch.setattr(fetch_module, "released", lambda: table)


@pytest.fixture
def drive(tmp_path, monkeypatch, original_file):
    """Google Drive with one file, whose hash nobody knows, and an empty weights folder."""
    drive = Drive()
    drive.files[DRIVE_ID] = original_file
    publish_hash(monkeypatch, None)
    monkeypatch.setattr(gdown, "download", drive.download)
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path / "w"))
    return drive


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "w"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_fetch_makes_pretrained_work(drive, weights, original, original_file, capsys):
    assert main(["fetch", NAME]) == 0
    assert files(weights) == MODEL_FILES
    expected = convert_original(original, NAME)
    model = timm.create_model(NAME, pretrained=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    output = capsys.readouterr().out
    assert hashlib.sha256(original_file).hexdigest() in output
    assert "none was published to compare with" in output

    assert main(["fetch", NAME]) == 0
    assert "already in" in capsys.readouterr().out
    assert drive.downloads == 1


def test_another_file_than_the_known_one_is_refused(drive, weights, original_file, tmp_path, monkeypatch, capsys):
    """The remedy in the error works, and the known one is accepted."""
    publish_hash(monkeypatch, "0" * 64)
    assert main(["fetch", NAME]) == 1
    message = capsys.readouterr().err
    for part in (hashlib.sha256(original_file).hexdigest(), "0" * 64, f"https://drive.google.com/uc?id={DRIVE_ID}"):
        assert part in message
    assert files(weights) == []
    (tmp_path / "FILE").write_bytes(original_file)
    command = re.search(r"`python -m equivision_timm (.*)`", message)[1].replace("FILE", str(tmp_path / "FILE"))
    assert main(command.split()) == 0
    assert files(weights) == MODEL_FILES
    shutil.rmtree(weights / f"{NAME}.equivision_in1k")
    publish_hash(monkeypatch, hashlib.sha256(original_file).hexdigest())
    fetch(NAME)
    assert "(as published)" in capsys.readouterr().out


SPOILT = {
    "over quota": (gdown.exceptions.DownloadError("Too many users"), "Too many users"),
    "no checkpoint": (b"no checkpoint at all" * 1000, "not a checkpoint"),
    "code inside": (saved({"conv1.weights": os.getcwd}), "not a checkpoint"),
    "another model": (saved({"fc.bias": torch.ones(3)}), "missing"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_clear_error_and_nothing_half_written(drive, weights, capsys, spoilt):
    """The other models are fetched all the same."""
    drive.files[DRIVE_ID], noun = SPOILT[spoilt]
    assert main(["fetch", "c8resnet50", NAME]) == 1
    captured = capsys.readouterr()
    assert [line.partition(":")[0] for line in captured.err.splitlines()] == ["c8resnet50", NAME]
    assert noun in captured.err
    assert f"https://drive.google.com/uc?id={DRIVE_ID}" in captured.out
    assert files(weights) == ([f"downloads/{NAME}.ckpt"] if spoilt == "another model" else [])
    if spoilt == "another model":  # a whole download is not repeated
        assert main(["fetch", NAME]) == 1
        assert drive.downloads == 1


@pytest.mark.parametrize(
    ("options", "noun"), [(["--images", "."], "photographs"), (["--signs", "x"], "signs"), ([], "cannot write")]
)
def test_what_is_known_before_the_download(drive, weights, tmp_path, monkeypatch, capsys, options, noun):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if not options:
        weights.write_text("a file in the place of the folder")
    assert main(["fetch", NAME, "d1resnet18", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert noun in line
    assert drive.downloads == 0


def test_signs_reach_the_conversion(drive, monkeypatch):
    """The checkpoint of a D4 network, whose coefficients mean something only together with the signs."""
    monkeypatch.setattr(equivision, "load_photographs", lambda _: [])
    monkeypatch.setattr(equivision, "draw_crops", lambda _: torch.randn(2, 3, 33, 33))
    d4, pattern = checkpoint("d4resnet18"), list(known_patterns("d4"))[1]
    drive.files[released()["d4resnet18"].drive_id] = saved(d4)
    assert main(["fetch", "d4resnet18", "--signs", pattern]) == 0
    weight = timm.create_model("d4resnet18", pretrained=True).layer4[1].conv2.conv.weight
    expected, unsigned = convert_original(d4, "d4resnet18", signs=pattern), convert_original(d4, "d4resnet18")
    assert torch.equal(weight, expected["layer4.1.conv2.conv.weight"])
    assert not torch.equal(weight, unsigned["layer4.1.conv2.conv.weight"])
