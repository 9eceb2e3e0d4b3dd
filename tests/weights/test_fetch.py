"""`fetch`: from a file on Google Drive on loopback to a model that `create_model` finds."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
from support.equivision_data import to_equivision
from support.reference_data import checkpoint
from support.small_models import narrow

from equivision_timm.cli.main import main
from equivision_timm.errors import install_command
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.weights import equivision
from equivision_timm.weights import fetch as fetch_module
from equivision_timm.weights.equivision import convert_original
from equivision_timm.weights.fetch import fetch
from equivision_timm.weights.released import released
from equivision_timm.weights.signs import known_patterns

pytest.importorskip("gdown", reason="fetching needs the extra `fetch`")
from support.drive_server import Drive

NAME = "c4resnet18"
DRIVE_ID = released()[NAME].drive_id
MIB = 1 << 20


def saved(state_dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small():
    with narrow(NAME, width=14):
        yield


def draw(seed=0):
    torch.manual_seed(seed)
    return to_equivision(timm.create_model(NAME).state_dict(), order=4)


@pytest.fixture(scope="module")
def original(small):
    return draw()


@pytest.fixture(scope="module")
def original_file(original):
    return saved(original)


def publish_hash(monkeypatch, sha256):
    """Make `sha256` the known hash of the checkpoint, and the only one."""
    table = {name: replace(entry, sha256=sha256 if name == NAME else None) for name, entry in released().items()}
    monkeypatch.setattr(fetch_module, "released", lambda: table)


@pytest.fixture
def drive(tmp_path, monkeypatch, original_file):
    """Google Drive with one file, whose hash nobody knows, an empty weights folder, and nothing else of the user's."""
    publish_hash(monkeypatch, None)
    with Drive(tmp_path) as drive:
        drive.files[DRIVE_ID] = original_file
        environment = {
            **drive.environment,
            "HOME": str(tmp_path / "home"),
            "EQUIVISION_TIMM_WEIGHTS": str(tmp_path / "w"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield drive


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "w"


def files(folder):
    """Files below `folder`, without the locks, which may stay."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


MODEL_FILES = [f"{NAME}.equivision_in1k/config.json", f"{NAME}.equivision_in1k/model.safetensors"]


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
    assert drive.offsets == [0]


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


def test_a_file_that_changed_between_the_parts_is_refused(drive, weights):
    drive.break_after = MIB
    with pytest.raises(ConnectionError):
        fetch(NAME)
    drive.break_after = None
    drive.files[DRIVE_ID] = saved(draw(seed=1))
    with pytest.raises(WeightsError, match="checksum"):
        fetch(NAME)
    assert files(weights) == []
    fetch(NAME)  # afresh
    assert files(weights) == MODEL_FILES


SPOILT = {
    "over quota": "Too many users",
    "not there": "did not give the checkpoint of c4resnet18",
    "no network": f"https://drive.google.com/uc?id={DRIVE_ID} in a browser",
    "no checkpoint": "not a checkpoint",
    "code inside": "not a checkpoint",
    "another model": "has shape",
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_clear_error_and_nothing_half_written(drive, weights, monkeypatch, capsys, spoilt):
    """The other models are fetched all the same."""
    contents = {"no checkpoint": b"no checkpoint at all" * 1000, "code inside": saved({"conv1.weights": os.getcwd})}
    contents["another model"] = saved(checkpoint("c4resnet18_fast"))
    drive.over_quota = spoilt == "over quota"
    if spoilt == "not there":
        drive.files.clear()
    elif spoilt == "no network":
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    elif spoilt in contents:
        drive.files[DRIVE_ID] = contents[spoilt]
    assert main(["fetch", "c8resnet101", NAME]) == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert "no weights of c8resnet101 were released" in errors
    assert SPOILT[spoilt] in errors
    assert files(weights) == ([f"downloads/{NAME}.ckpt"] if spoilt == "another model" else [])
    if spoilt == "another model":  # a whole download is not repeated
        assert main(["fetch", NAME]) == 1
        assert drive.offsets == [0]


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
    assert drive.offsets == []


def test_without_gdown(drive, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert main(["fetch", NAME]) == 2
    assert install_command("fetch") in capsys.readouterr().err


def test_two_processes_at_once(drive, weights, tmp_path):
    """One downloads, the other waits for it; and no cookies are left in the home folder."""
    code = f"""
from dataclasses import replace
from equivision_timm.cli.main import main
from equivision_timm.models.equivariant_resnet import VARIANTS
from equivision_timm.weights.released import released
variant, table = VARIANTS["{NAME}"], released()
VARIANTS["{NAME}"] = replace(variant, arguments=dict(variant.arguments) | dict(width=14))
table["{NAME}"] = replace(table["{NAME}"], sha256=None)
raise SystemExit(main(["fetch", "{NAME}"]))
"""
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert sorted("written" in output for output in outputs) == [False, True]
    assert sorted("already in" in output for output in outputs) == [False, True]
    assert drive.offsets == [0]
    assert files(weights) == MODEL_FILES
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file()]


def test_signs_reach_the_conversion(drive, monkeypatch):
    """The checkpoint of a D4 network, whose coefficients mean something only together with the signs."""
    monkeypatch.setattr(equivision, "load_photographs", lambda _: [])  # the weights are random
    d4 = checkpoint("d4resnet18")
    drive.files[released()["d4resnet18"].drive_id] = saved(d4)
    pattern = list(known_patterns("d4"))[1]
    assert main(["fetch", "d4resnet18", "--signs", pattern]) == 0
    model = timm.create_model("d4resnet18", pretrained=True)
    expected, unsigned = convert_original(d4, "d4resnet18", signs=pattern), convert_original(d4, "d4resnet18")
    weight = model.layer4[1].conv2.conv.weight
    assert torch.equal(weight, expected["layer4.1.conv2.conv.weight"])
    assert not torch.equal(weight, unsigned["layer4.1.conv2.conv.weight"])
