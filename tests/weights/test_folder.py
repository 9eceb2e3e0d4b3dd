"""Model folders: timm loads them, they are written all or nothing; and the hash of their tensors."""

import errno
import hashlib
import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.errors import InputError
from equivision_timm.models.pretrained import hash_tensors, read_checked
from equivision_timm.weights import folder as folder_module
from equivision_timm.weights.folder import write_model_folder

NAME = "test_c8resnet"
PROVENANCE = {"source_sha256": "0" * 64, "signs": "+-+"}


def state(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(NAME).state_dict()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_timm_loads_the_folder(tmp_path):
    folder = write_model_folder(tmp_path / "a" / "b", NAME, state(), PROVENANCE)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, state()[key]) for key, value in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architecture"] == NAME
    assert read_checked(folder / "model.safetensors")[1].items() > PROVENANCE.items()


def test_other_files_are_kept_and_other_models_not_replaced(tmp_path):
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    (folder / "README.md").write_text("mine")
    write_model_folder(folder, NAME, state(1), {})
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(load_file(folder / "model.safetensors")["fc.weight"], state(1)["fc.weight"])
    assert read_checked(folder / "model.safetensors")[1].keys() == {"model_args"}
    before = contents(folder)
    with pytest.raises(InputError, match="test_d4resnet"):
        write_model_folder(folder, "test_d4resnet", timm.create_model("test_d4resnet").state_dict(), {})
    assert contents(folder) == before


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text("[1, 2]")
    for target in ("file", "file/below", "strange"):
        with pytest.raises(InputError, match=target.split("/")[0]):
            write_model_folder(tmp_path / target, NAME, state(), {})
    for changes in ({"fc.bias": torch.zeros(3)}, {"fc.more": torch.zeros(3)}):
        with pytest.raises(RuntimeError, match=r"fc\."):
            write_model_folder(tmp_path / "new", NAME, {**state(), **changes}, {})
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        write_model_folder(tmp_path / "new", NAME, {k: v for k, v in state().items() if k != "fc.bias"}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "strange"]


@pytest.mark.parametrize(("call", "home"), [("save_file", folder_module), ("replace", os)])
def test_a_failure_leaves_the_old_folder(tmp_path, monkeypatch, call, home):
    """As on a full disk: nothing has changed, and nothing unfinished lies there."""
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    before = contents(folder)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(home, call, fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="space"):
            write_model_folder(target, NAME, state(1), {})
    assert contents(folder) == before
    assert contents(tmp_path / "new") == {}


TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7), "c": torch.ones(3)}
CHANGED = {
    "a value": {**TENSORS, "c": torch.tensor([1.0, 1.0, 1.0000001])},
    "the sign of a zero": {**TENSORS, "a": TENSORS["a"] * torch.where(TENSORS["a"] == 0, -1.0, 1.0)},
    "a dtype": {**TENSORS, "b": torch.tensor(7, dtype=torch.int32)},
    "a shape": {**TENSORS, "a": TENSORS["a"].reshape(4, 3)},
    "a name": {"a": TENSORS["a"], "b": TENSORS["b"], "d": TENSORS["c"]},
    "one less": {"a": TENSORS["a"], "b": TENSORS["b"]},
}


def test_the_hash_notices_every_change():
    """Its definition is written out for one entry: files converted today are compared in later versions."""
    other = {"c": torch.ones(()).expand(3), "b": TENSORS["b"], "a": TENSORS["a"].t().contiguous().t()}
    assert hash_tensors(other) == hash_tensors(TENSORS)
    assert [change for change, tensors in CHANGED.items() if hash_tensors(tensors) == hash_tensors(TENSORS)] == []
    parts = [b"w", b"float32", b"(2,)", b"\x00\x00\x80\x3f\x00\x00\x00\x40"]
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert hash_tensors({"w": torch.tensor([1.0, 2.0])}) == expected
