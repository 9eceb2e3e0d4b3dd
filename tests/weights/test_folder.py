"""Model folders: what timm loads, written all or nothing."""

import errno
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.arguments import InputError
from equivision_timm.weights import folder as folder_module
from equivision_timm.weights.folder import read_provenance, write_model_folder

NAME = "test_c8resnet"
PROVENANCE = {"source_sha256": "0" * 64, "signs": "+-+"}


def state(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(NAME).state_dict()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(parent):
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_timm_loads_the_folder(tmp_path):
    folder = write_model_folder(tmp_path / "a" / "b", NAME, state(), PROVENANCE)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert type(model).__name__ == "EquivariantResNet"
    assert all(torch.equal(value, state()[key]) for key, value in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architecture"] == NAME
    assert read_provenance(folder) == PROVENANCE
    assert read_provenance(folder / "model.safetensors") == PROVENANCE
    assert leftovers(tmp_path / "a") == []


def test_replacing_keeps_other_files_and_other_models(tmp_path):
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    (folder / "README.md").write_text("mine")
    write_model_folder(folder, NAME, state(1), {})
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(load_file(folder / "model.safetensors")["fc.weight"], state(1)["fc.weight"])
    assert read_provenance(folder) == {}

    before = contents(folder)
    with torch.device("meta"):
        other = timm.create_model("test_d4resnet").state_dict()
    with pytest.raises(ValueError, match=r"holds test_c8resnet, and test_d4resnet would take its place"):
        write_model_folder(folder, "test_d4resnet", other, {})
    assert contents(folder) == before


def test_what_cannot_be_written_there(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_model_folder(tmp_path / "file", NAME, state(), {})
    with pytest.raises(InputError, match=r"cannot write .*file"):
        write_model_folder(tmp_path / "file" / "below", NAME, state(), {})
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="belongs to something else"):
        write_model_folder(tmp_path / "strange", NAME, state(), {})
    with pytest.raises(ValueError, match=r"do not fit test_c8resnet: 1 entries differ, fc.bias"):
        write_model_folder(tmp_path / "new", NAME, {k: v for k, v in state().items() if k != "fc.bias"}, {})
    with pytest.raises(ValueError, match=r"fc\.bias"):
        write_model_folder(tmp_path / "new", NAME, {**state(), "fc.bias": torch.zeros(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "strange"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_system_calls_leave_the_old_folder(tmp_path, monkeypatch, code, call):
    """A full disk, a read-only one, a broken one: the error comes through, the old files stay, nothing else does."""
    folder = write_model_folder(tmp_path / "x", NAME, state(0), PROVENANCE)
    before = contents(folder)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module.os, call, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_model_folder(folder, NAME, state(1), {})
    with pytest.raises(OSError, match=os.strerror(code)):
        write_model_folder(tmp_path / "new", NAME, state(1), {})
    monkeypatch.undo()
    assert contents(folder) == before
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_a_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        folder = write_model_folder(mount / "x", NAME, state(0), PROVENANCE)
        before = contents(folder)
        (mount / "filler").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 65536))
        with pytest.raises(OSError, match="No space left"):
            write_model_folder(folder, NAME, state(1), {})
        assert contents(folder) == before
        assert leftovers(mount) == []
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        with pytest.raises(InputError, match="Read-only"):
            write_model_folder(folder, NAME, state(1), {})
        assert contents(folder) == before
    finally:
        subprocess.run(["umount", str(mount)], check=True)


KILLS = """
import os, random, signal, sys, time
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
    """kill -9 at twenty moments: the folder always holds one of the two models, whole; only hidden folders may stay."""
    folder = tmp_path / "x"
    subprocess.run([sys.executable, "-c", KILLS, str(folder)], check=True)
    hidden = leftovers(tmp_path)
    assert hidden, "no kill met a writer at work"
    assert all(name.startswith(".x.partial-") for name in hidden)
    write_model_folder(folder, NAME, state(), {})  # goes on as if nothing had happened


def test_provenance_of_other_files(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert read_provenance(tmp_path / "plain.safetensors") == {}
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        read_provenance(tmp_path / "damaged.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_provenance(tmp_path)
