"""`verify`: sound model folders pass; nothing that was changed after its conversion does, under any name."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.reference_data import checkpoint
from timm.models import save_for_hf

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.main import main
from equivision_timm.cli.verify import verify
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import TENSORS_SHA256, hash_tensors, read_checked
from equivision_timm.weights.folder import write_model_folder

NAME, OTHER = "test_d4resnet", "test_c8resnet"  # the same names and shapes
MODEL = timm.create_model(NAME, pretrained=True)
STATE = dict(MODEL.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As a conversion writes it; read only."""
    return write(tmp_path_factory.mktemp("weights") / "model", NAME, STATE)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    coarse = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((120, 80)).save(folder / "a.png")
    return folder


def write(folder, name, state):
    origin = {"model": name, "source_sha256": "ab" * 32, TENSORS_SHA256: hash_tensors(state)}
    return write_model_folder(folder, name, state, origin)


def metadata(folder):
    return read_checked(folder / "model.safetensors")[1]


def rows(checks):
    return {check.name: check for check in checks}


def accepted(folder, photographs):
    return all(check.ok is not False for check in verify(str(folder), photographs))


def test_the_unchanged_folder_is_accepted(folder, tmp_path, photographs, capsys):
    """Control, also of a copy that was saved again; as a table and as JSON."""
    copy = shutil.copytree(folder, tmp_path / "model")
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors", metadata(folder))
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text())))
    assert main(["verify", str(copy), "--images", str(photographs)]) == 0
    table = capsys.readouterr().out
    assert "ab" * 32 in table
    assert "FAILED" not in table
    assert main(["verify", str(copy), "--images", str(photographs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    named = {check["name"]: check["ok"] for check in found["checks"]}
    assert found["ok"] is named["loads"] is named["equivariance"] is True


KEY = "layer1.0.conv1.conv.weight"
CHANGES = {
    "a value": {"state": {KEY: STATE[KEY].nextafter(torch.tensor(9.0))}},
    "a dtype": {"state": {KEY: STATE[KEY].double()}},
    "one more": {"state": {KEY + ".more": STATE[KEY].clone()}},
    "a name": {"state": {KEY: None, "module." + KEY: STATE[KEY]}},
    "the model": {"metadata": {"model": OTHER}},
    "the hash": {"metadata": {TENSORS_SHA256: "0" * 64}},
    "the architecture": {"config": {"architecture": OTHER}},
    "the group": {"config": {"model_args": {"group": "c8"}}},
    "the pooling": {"config": {"model_args": {"global_pool": "max"}}},
    "the normalisation": {"config": {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}},
    "the size": {"config": {"pretrained_cfg": {"input_size": [3, 97, 97]}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folders(folder, tmp_path, photographs, change):
    copy, parts = shutil.copytree(folder, tmp_path / "model"), CHANGES[change]
    state = {key: value for key, value in {**STATE, **parts.get("state", {})}.items() if value is not None}
    save_file(state, copy / "model.safetensors", {**metadata(folder), **parts.get("metadata", {})})
    config = json.loads((copy / "config.json").read_text())
    for key, value in parts.get("config", {}).items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(config))
    assert not accepted(copy, photographs)


def test_folders_of_timm(tmp_path, photographs):
    """timm writes no metadata, and arguments into the config."""
    for name in (NAME, "test_d4vit"):
        save_for_hf(timm.create_model(name, pretrained=True), tmp_path / name, safe_serialization=True)
        assert rows(verify(str(tmp_path / name), photographs))["equivariance"].ok
        assert accepted(tmp_path / name, photographs)
    file = tmp_path / NAME / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_classes": 9}))
    assert not rows(verify(str(tmp_path / NAME)))["loads"].ok  # timm leaves the classifier at random


def test_files_and_names(folder, tmp_path, photographs, monkeypatch):
    assert rows(verify(str(folder / "model.safetensors"), photographs))["equivariance"].ok
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    for missing in ("d4resnet18", "no_such_model", str(tmp_path)):
        assert not rows(verify(missing, photographs))["loads"].ok


@pytest.mark.parametrize(
    ("entry", "change", "failing"),
    [
        ("layer1.0.conv1.conv.weight", lambda v: v * float("nan"), "loads"),
        ("conv1.norm.per_field.running_var", lambda v: -v, "loads"),
        ("fc.weight", lambda v: v * 0, "equivariance"),
    ],
)
def test_bad_values_fail(tmp_path, photographs, entry, change, failing, capsys):
    folder = write(tmp_path / "x", NAME, {**STATE, entry: change(STATE[entry])})
    assert main(["verify", str(folder), "--images", str(photographs)]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(failing))
    assert "FAILED" in row


def test_a_network_that_is_not_equivariant_fails(folder, photographs, monkeypatch):
    """Control: the measured error decides."""
    monkeypatch.setattr(EquivariantResNet, "exact_sizes", lambda model, near: (96, 96))  # not exact
    assert rows(verify(str(folder), photographs))["equivariance"].ok is False


def test_no_photographs(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    check = rows(verify(str(folder)))["statistics"]
    assert check.ok is None
    assert "--images DIR" in check.finding
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "missing"):
        assert rows(verify(str(folder), tmp_path / wrong))["statistics"].ok is False


CONVERTED = "c4resnet18_fast"


@pytest.fixture
def ckpt(tmp_path):
    """A checkpoint as Lightning writes it, in float16."""
    state = {f"model.{key}": v.half() if v.is_floating_point() else v for key, v in checkpoint(CONVERTED).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_convert_writes_a_model_that_verify_accepts(ckpt, tmp_path, photographs, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(ckpt), "--model", CONVERTED, "--out", str(out), "--images", str(photographs)]) == 0
    printed, provenance = capsys.readouterr().out, metadata(out)
    state = load_file(out / "model.safetensors")
    assert provenance["dtypes_of_file"] == "float16"
    assert provenance["basis_from"] == "coefficients"
    assert provenance["model"] == CONVERTED
    assert provenance[TENSORS_SHA256] == hash_tensors(state)
    assert {"torch", "timm", "equivision-timm", "date", "source_file", "source_sha256", "statistics"} <= set(provenance)
    assert all(value in printed for key, value in provenance.items() if key != "model_args")
    assert str(out) in printed
    assert main(["verify", str(out), "--images", str(photographs)]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "noun"),
    [
        (["missing.ckpt", "--model", CONVERTED, "--out", "out"], 2, "missing.ckpt"),
        (["last.ckpt", "--model", "c4resnet18", "--out", "out"], 1, "has shape"),
        (["last.ckpt", "--model", CONVERTED, "--out", "out", "--signs", "++"], 2, "signs"),
        (["last.ckpt", "--model", CONVERTED, "--out", "last.ckpt"], 2, "cannot write"),
        (["last.ckpt", "--model", CONVERTED, "--out", "out", "--images", "nowhere"], 2, "photographs"),
        (["last.ckpt", "--model", "c8reresnet50", "--out", "out", "--signs", "++"], 2, "signs"),
    ],
)
def test_what_cannot_be_converted(ckpt, tmp_path, monkeypatch, capsys, arguments, status, noun):
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert noun in line
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
