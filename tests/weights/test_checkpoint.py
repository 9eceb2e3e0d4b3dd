"""Reading checkpoint files: the forms that occur, code that must not run, and damaged files."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.weights.checkpoint import DamagedFile, read_checkpoint

STATE = {"conv1.weights": torch.arange(6.0), "bn1.batch_norm_[8].num_batches_tracked": torch.tensor(3)}
OPTIONS = argparse.Namespace(model="hybrid", lr=3e-3, output_dir="")
LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.0.9", "optimizer_states": [{"state": {0: torch.ones(2)}}]}
FORMS = {
    "bare": STATE,
    "state_dict": {"state_dict": STATE},
    "lightning": {**LIGHTNING, "state_dict": {f"model.{key}": value for key, value in STATE.items()}},
    "ddp": {f"module.{key}": value for key, value in STATE.items()},
    "lightning and ddp": {"state_dict": {f"model.module.{key}": value for key, value in STATE.items()}},
    "deit": {"model": {f"_orig_mod.{key}": value for key, value in STATE.items()}, "args": OPTIONS, "epoch": 399},
    "dinov2": {"teacher": STATE, "student": {}},
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_occur(tmp_path, form):
    for zipped in (True, False):
        torch.save(FORMS[form], tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        assert same(read_checkpoint(tmp_path / "x.ckpt"), STATE)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    save_file(STATE, tmp_path / "x.ckpt")  # safetensors with any name
    assert same(read_checkpoint(tmp_path / "x.ckpt"), STATE)


def test_two_sets_of_weights_are_refused(tmp_path):
    torch.save({**STATE, "model.conv1.weights": torch.zeros(6)}, tmp_path / "x.ckpt")
    with pytest.raises(DamagedFile, match="prefix"):
        read_checkpoint(tmp_path / "x.ckpt")


class Harmful:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, legacy):
    path, proof = tmp_path / "x.ckpt", tmp_path / "proof"
    torch.save({**STATE, "hyper_parameters": Harmful(proof)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DamagedFile, match="mkdir"):
        read_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # control: it would have been run
    assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>",
        b"PK\x03\x04" + bytes(50),
        (40).to_bytes(8, "little") + b'{"a": 1}' + bytes(60),
        [1, 2],
        torch.ones(3),
        {"a": "text"},
        {"a": {"b": torch.ones(1)}},
    ],
)
def test_files_that_are_not_checkpoints(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "x.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(DamagedFile, match=r"x\.ckpt") as raised:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(raised.value)


def test_damaged_files(tmp_path):
    """Wherever a bit of a zip archive is flipped: the same tensors, or one error."""
    torch.save(STATE, tmp_path / "x.ckpt")
    content, refused = (tmp_path / "x.ckpt").read_bytes(), 0
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "x.ckpt").write_bytes(damaged)
        try:
            assert same(read_checkpoint(tmp_path / "x.ckpt"), STATE)
        except DamagedFile:  # anything else is a failure
            refused += 1
    assert refused > 45
