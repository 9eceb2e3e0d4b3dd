"""Nothing that was changed after its conversion passes `verify`, and no model under the name of another one."""

import json
import shutil

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.demo import load_digits
from equivision_timm.kernel_basis import manifest
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.weights.verify import check_files, verify

NAME, OTHER = "test_d4resnet", "test_c8resnet"  # the same names and shapes
STATE = {key: value for key, value in timm.create_model(NAME, pretrained=True).state_dict().items()}
FLOATS = [key for key, value in STATE.items() if value.is_floating_point()]
KEYS = st.sampled_from(list(STATE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As a conversion writes it; read only."""
    return write(tmp_path_factory.mktemp("weights") / "model", NAME, STATE)


def write(folder, name, state):
    origin = {"model": name, "source_sha256": "ab" * 32, "basis_sha256": manifest()["sha256"]}
    return write_model_folder(folder, name, state, {**origin, TENSORS_SHA256: hash_tensors(state)})


def accepted(folder):
    return all(check.ok is not False for check in check_files(str(folder))[0])


def other_values(value):
    """The entry with other values of the same type and shape."""
    changes = [lambda x: x + 1, lambda x: x * 0 if x.any() else x + 2]
    if value.is_floating_point():
        changes += [lambda x: x * 1.001 + 1e-6, lambda x: x.nextafter(torch.full_like(x, 9.0)), lambda x: -x - 1]
        changes += [lambda x: torch.full_like(x, float("nan")), lambda x: x.half().float() + 1e-7]
    if value.numel() > 1:
        changes += [lambda x: x.roll(1) if not torch.equal(x.roll(1), x) else x + 1]
    return st.sampled_from([change(value) for change in changes])


@st.composite
def changed_tensors(draw):
    """A state dict that is not STATE."""
    state, key = dict(STATE), draw(KEYS)
    kind = draw(st.sampled_from(["value", "swap", "rename", "drop", "extra", "shape", "type"]))
    if kind == "value":
        state[key] = draw(other_values(state[key]))
    elif kind == "swap":
        alike = [k for k in STATE if STATE[k].shape == STATE[key].shape and not torch.equal(STATE[k], STATE[key])]
        other = draw(st.sampled_from(alike or [key]))
        state[key], state[other] = (STATE[other], STATE[key]) if alike else (STATE[key] + 1, STATE[key])
    elif kind == "rename":
        state[draw(st.sampled_from([key + "x", "module." + key, key.upper()]))] = state.pop(key)
    elif kind == "drop":
        del state[key]
    elif kind == "extra":
        state[key + ".more"] = state[key]
    elif kind == "shape":
        state[key] = state[key][None]
    else:
        state[key] = state[key].double() if state[key].is_floating_point() else state[key].int() + 1
    return state


@settings(max_examples=30, deadline=None, derandomize=True)
@given(state=changed_tensors())
def test_changed_tensors(folder, tmp_path_factory, state):
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("changed") / "model")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, copy / "model.safetensors", metadata)
    assert not accepted(copy)
    shutil.rmtree(copy.parent)


METADATA = [
    {"model": OTHER},
    {"model": "resnet18"},
    {"model": "hf-hub:someone/model"},
    {TENSORS_SHA256: "0" * 64},
    {TENSORS_SHA256: ""},
    {"basis_sha256": "0" * 64},
]


@pytest.mark.parametrize("change", METADATA, ids=str)
def test_changed_metadata(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "model")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors", {**metadata, **change})
    assert not accepted(copy)


CONFIG = [
    {"architecture": OTHER},
    {"architecture": "resnet18"},
    {"architecture": None},
    {"num_classes": 0},
    {"num_classes": 10**9},
    {"num_classes": 9},
    {"num_classes": "10"},
    {"model_args": {"group": "c8"}},
    {"model_args": {"act_layer": "gelu"}},
    {"model_args": {"bn_eps": 0.1}},
    {"model_args": {"global_pool": "max"}},
    {"model_args": {"map_pool": "max"}},
    {"model_args": {"in_chans": 1}},
    {"model_args": []},
    {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}},
    {"pretrained_cfg": {"interpolation": "nearest"}},
    {"pretrained_cfg": {"crop_pct": 0.5}},
    {"pretrained_cfg": {"input_size": [1, 65, 65]}},
    {"pretrained_cfg": {"input_size": "65"}},
    {"pretrained_cfg": {"num_classes": 11}},
    {"pretrained_cfg": {"classifier": "head"}, "num_classes": 11},
    {"pretrained_cfg": 3},
]


@pytest.mark.parametrize("change", CONFIG, ids=str)
def test_changed_config(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    (copy / "config.json").write_text(json.dumps(config))
    assert not accepted(copy)


def test_the_unchanged_folder_is_accepted(folder, tmp_path):
    """Control, also where it was copied and saved again."""
    assert accepted(folder)
    copy = shutil.copytree(folder, tmp_path / "model")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors", metadata)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text())))
    assert accepted(copy)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Pictures like those of the training."""
    folder = tmp_path_factory.mktemp("digits")
    for i, digit in enumerate(load_digits()[0][:40]):
        Image.fromarray(digit.numpy()).resize((65, 65), Image.Resampling.BILINEAR).save(folder / f"{i:02}.png")
    return folder


def test_trained_weights_under_the_name_of_another_model(tmp_path, digits):
    """All files agree with each other: the running statistics alone tell."""
    for truth in (OTHER, NAME):
        state = timm.create_model(truth, pretrained=True).state_dict()
        for name in (OTHER, NAME):
            checks = verify(str(write(tmp_path / f"{truth} as {name}", name, state)), digits)
            failed = [check.name for check in checks if check.ok is False]
            assert failed == ([] if name == truth else ["other model"])
