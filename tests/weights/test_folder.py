"""Model folders: timm loads them, they are written all or nothing; and the hash of their tensors."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.errors import InputError
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.models.tensor_hash import hash_tensors
from equivision_timm.weights import folder as folder_module
from equivision_timm.weights.folder import read_provenance, write_model_folder

NAME = "test_c8resnet"
PROVENANCE = {"source_sha256": "0" * 64, "signs": "+-+"}


def state(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(NAME).state_dict()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(parent):
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_timm_loads_the_folder(tmp_path):
    folder = write_model_folder(tmp_path / "a" / "b", NAME, state(), PROVENANCE)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, state()[key]) for key, value in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architecture"] == NAME
    assert read_provenance(folder) == read_provenance(folder / "model.safetensors") == PROVENANCE
    assert hidden(tmp_path / "a") == []


def test_other_files_are_kept_and_other_models_not_replaced(tmp_path):
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    (folder / "README.md").write_text("mine")
    write_model_folder(folder, NAME, state(1), {})
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(load_file(folder / "model.safetensors")["fc.weight"], state(1)["fc.weight"])
    assert read_provenance(folder) == {}
    before = contents(folder)
    with pytest.raises(InputError, match="holds test_c8resnet"):
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
        with pytest.raises(WeightsError, match=r"fc\."):
            write_model_folder(tmp_path / "new", NAME, {**state(), **changes}, {})
    with pytest.raises(WeightsError, match=r"fc\.bias"):
        write_model_folder(tmp_path / "new", NAME, {k: v for k, v in state().items() if k != "fc.bias"}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "strange"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_system_calls_leave_the_old_folder(tmp_path, monkeypatch, code, call):
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    before = contents(folder)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module.os, call, fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match=os.strerror(code)):
            write_model_folder(target, NAME, state(1), {})
    monkeypatch.undo()
    assert contents(folder) == before
    assert hidden(tmp_path) == []
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        folder = write_model_folder(mount / "x", NAME, state(0), PROVENANCE)
        before = contents(folder)
        (mount / "filler").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 65536))
        with pytest.raises(OSError, match=r"space|device"):
            write_model_folder(folder, NAME, state(1), {})
        assert contents(folder) == before
        assert hidden(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


KILLS = """
import os, signal, sys, time
import equivision_timm, timm, torch
from equivision_timm.weights.folder import read_provenance, write_model_folder
from safetensors.torch import load_file

torch.set_num_threads(1)
folder, states = sys.argv[1], []
for seed in (0, 1):
    torch.manual_seed(seed)
    states.append(timm.create_model("test_c8resnet").state_dict())
write_model_folder(folder, "test_c8resnet", states[0], {"seed": "0"})
config = open(folder + "/config.json").read()
for delay in [0.01 * i for i in range(1, 21)]:
    child = os.fork()
    if not child:
        for i in range(1, 10**6):
            write_model_folder(folder, "test_c8resnet", states[i % 2], {"seed": str(i % 2)})
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found, expected = load_file(folder + "/model.safetensors"), states[int(read_provenance(folder)["seed"])]
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert open(folder + "/config.json").read() == config
"""


def test_killed_while_writing(tmp_path):
    """kill -9 at twenty moments: the folder always holds one of the two models, whole; hidden folders may stay."""
    folder = tmp_path / "x"
    subprocess.run([sys.executable, "-c", KILLS, str(folder)], check=True)
    assert hidden(tmp_path), "no kill met a writer at work"
    assert all(name.startswith(".x.partial-") for name in hidden(tmp_path))
    write_model_folder(folder, NAME, state(), {})


def test_provenance_of_other_files(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert read_provenance(tmp_path / "plain.safetensors") == {}
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightsError, match="damaged"):
        read_provenance(tmp_path / "damaged.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_provenance(tmp_path)


TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7), "c": torch.ones(3)}
CHANGED = {
    "a value": {**TENSORS, "c": torch.tensor([1.0, 1.0, 1.0000001])},
    "two swapped": {**TENSORS, "c": TENSORS["a"][0, :3], "a": TENSORS["a"].flip(0)},
    "the sign of a zero": {**TENSORS, "a": TENSORS["a"] * torch.where(TENSORS["a"] == 0, -1.0, 1.0)},
    "a dtype": {**TENSORS, "b": torch.tensor(7, dtype=torch.int32)},
    "the same bytes in another dtype": {**TENSORS, "c": torch.ones(3).view(torch.int32)},
    "a shape": {**TENSORS, "a": TENSORS["a"].reshape(4, 3)},
    "a name": {"a": TENSORS["a"], "b": TENSORS["b"], "d": TENSORS["c"]},
    "one more": {**TENSORS, "d": torch.zeros(0)},
    "one less": {"a": TENSORS["a"], "b": TENSORS["b"]},
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_the_hash_notices_every_change(changed):
    other = {"c": torch.ones(()).expand(3), "b": TENSORS["b"], "a": TENSORS["a"].t().contiguous().t()}
    assert hash_tensors(other) == hash_tensors(TENSORS) != hash_tensors(changed)


def test_the_definition_of_the_hash():
    """Written out for one entry: files converted today are compared in later versions."""
    parts = [b"w", b"float32", b"(2,)", b"\x00\x00\x80\x3f\x00\x00\x00\x40"]
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert hash_tensors({"w": torch.tensor([1.0, 2.0])}) == expected
