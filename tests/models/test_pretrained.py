"""`create_model(name, pretrained=True)` with weights in the local weights folder, and the ways around it."""

import json
import socket

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.small_models import narrow
from timm.models import get_pretrained_cfg

from equivision_timm.models.pretrained import (
    HUB_ORG,
    PUBLISHED,
    TENSORS_SHA256,
    WeightsError,
    hash_tensors,
    hub_id,
    local_folder,
    weights_folder,
)
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.weights.released import released

FAMILIES = [name for family in ("resnet", "vit") for name in timm.list_models("[cd]*", module=f"equivariant_{family}")]
NAME = "c4resnet18"
TAGGED = f"{NAME}.equivision_in1k"


@pytest.fixture(scope="module")
def small():
    with narrow(NAME, "d4resnet18", "c8resnet18"):
        yield


@pytest.fixture(scope="module")
def converted(small):
    """The model whose weights lie in the weights folder."""
    torch.manual_seed(0)
    return timm.create_model(NAME).eval()


@pytest.fixture(scope="module")
def folder(converted, tmp_path_factory):
    """A weights folder that holds one model."""
    folder = tmp_path_factory.mktemp("weights")
    write_model_folder(folder / TAGGED, NAME, converted.state_dict(), {"source_sha256": "0" * 64})
    return folder


@pytest.fixture(autouse=True)
def offline(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def elsewhere(converted, tmp_path):
    """A file with other weights."""
    path = tmp_path / "other.safetensors"
    save_file({key: value + 1 for key, value in converted.state_dict().items()}, path)
    return path


def same_weights(model, other, without=()):
    state, expected = model.state_dict(), other.state_dict()
    return all(torch.equal(value, expected[key]) for key, value in state.items() if not key.startswith(without))


def test_where_the_weights_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", "~/weights")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(weights_folder()) == "/home/someone/weights"
    monkeypatch.delenv("EQUIVISION_TIMM_WEIGHTS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(weights_folder()) == "/home/someone/.cache/equivision_timm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(weights_folder()) == "/caches/equivision_timm"
    assert str(local_folder(NAME)) == f"/caches/equivision_timm/{TAGGED}"
    assert str(local_folder("c1resnet18")) == "/caches/equivision_timm/c1resnet18"  # no weights, no tag


def test_only_published_weights_are_listed():
    """The released models have a tag, and a place on the Hub, in the list of timm, as soon as it holds them."""
    tags = {name for name in timm.list_models(include_tags=True) if name.partition(".")[0] in FAMILIES and "." in name}
    assert tags == {f"{name}.{get_pretrained_cfg(name).tag}" for name in released()}
    listed = {name.partition(".")[0] for name in timm.list_pretrained()}
    assert listed & set(FAMILIES) == set(PUBLISHED)
    for name in released():
        cfg = get_pretrained_cfg(name)
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (hub_id(name, cfg.tag), "model.safetensors")
    for published in PUBLISHED.values():
        assert (len(published.revision), len(published.tensors_sha256)) == (40, 64)


def test_local_folder_where_arguments_name_no_other_source(converted):
    for name, arguments in (
        (NAME, {}),
        (TAGGED, {}),
        (NAME, {"pretrained_cfg": "equivision_in1k"}),
        (NAME, {"pretrained_cfg": get_pretrained_cfg(NAME).to_dict()}),  # as timm's scripts pass it
        (NAME, {"pretrained_cfg_overlay": {"mean": (0.5, 0.5, 0.5)}}),
        (NAME, {"cache_dir": "nowhere"}),
    ):
        model = timm.create_model(name, pretrained=True, **arguments)
        assert same_weights(model, converted)
        overlay = arguments.get("pretrained_cfg_overlay", {})
        assert overlay.items() <= timm.data.resolve_model_data_config(model).items()
    assert not same_weights(timm.create_model(NAME), converted)  # without `pretrained`


def test_in_chans(converted):
    """A grey image gives what the colour image with three such channels gives."""
    original = converted.conv1.conv.weight
    for channels, expected in ((1, original.sum(1, keepdim=True)), (4, original[:, [0, 1, 2, 0]] * 3 / 4)):
        model = timm.create_model(NAME, pretrained=True, in_chans=channels)
        assert same_weights(model, converted, without="conv1.conv.")
        torch.testing.assert_close(model.conv1.conv.weight, expected)


def test_another_source_wins_over_the_weights_folder(converted, elsewhere):
    for source in (
        {"pretrained_cfg": {**get_pretrained_cfg(NAME).to_dict(), "file": str(elsewhere)}},
        {"pretrained_cfg_overlay": {"file": str(elsewhere)}},
        {"pretrained_cfg_overlay": {"state_dict": load_file(elsewhere)}},
        {"checkpoint_path": elsewhere},  # timm loads it last
    ):
        model = timm.create_model(NAME, pretrained=True, **source)
        assert torch.equal(model.fc.bias, converted.fc.bias + 1)


def test_another_place_on_the_hub_wins_over_the_weights_folder():
    """Offline, so the Hub is seen by its error."""
    for name, overlay in (
        (NAME, {"hf_hub_id": "someone/else"}),
        (NAME, {"hf_hub_id": f"{HUB_ORG}/{TAGGED}@a-revision"}),
        (NAME, {"hf_hub_id": f"{HUB_ORG}/{TAGGED}", "hf_hub_filename": "another.safetensors"}),
        (f"hf-hub:{HUB_ORG}/{TAGGED}", None),
    ):
        with pytest.raises((OSError, RuntimeError), match="Hub"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


def test_no_weights_anywhere(monkeypatch, tmp_path):
    """No connection is made for models that were never published; those that were released can be fetched."""

    def refuse(*_):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    for name in {"c8resnet18_fast", "d4vit_tiny_patch16_224", *released()} - set(PUBLISHED):
        with torch.device("meta"), pytest.raises(RuntimeError, match=f"fetch {name}" if name in released() else name):
            timm.create_model(name, pretrained=True)


@pytest.fixture
def broken_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    (tmp_path / TAGGED).mkdir()
    return tmp_path / TAGGED


def test_a_damaged_local_file(folder, broken_folder):
    content, file = (folder / TAGGED / "model.safetensors").read_bytes(), broken_folder / "model.safetensors"
    for keep in (0, 4, 100_000, -1):
        file.write_bytes(content[:keep])
        with pytest.raises(WeightsError, match="damaged"):
            timm.create_model(NAME, pretrained=True)


def test_a_local_file_that_does_not_hold_the_model(converted, broken_folder):
    """Seen by the hash in its metadata, or without metadata; the same file with the hash of its tensors is accepted."""
    state, file = converted.state_dict(), broken_folder / "model.safetensors"
    metadata = {"model": NAME, TENSORS_SHA256: hash_tensors(state)}
    save_file(state, file, metadata)
    assert same_weights(timm.create_model(NAME, pretrained=True), converted)
    for bias, origin, word in (
        (state["fc.bias"] + 1e-3, metadata, "hash"),
        (torch.full((1000,), float("nan")), None, r"fc\.bias"),
        (torch.ones(1000, dtype=torch.int32), None, r"fc\.bias"),
        (torch.ones(999), None, r"fc\.bias"),
    ):
        save_file({**state, "fc.bias": bias}, file, origin)
        with pytest.raises(RuntimeError, match=word):
            timm.create_model(NAME, pretrained=True)


def test_a_local_file_that_names_a_model_of_the_same_shapes(broken_folder):
    """A D4 network has the names and shapes of a C8 one."""
    folder = broken_folder.with_name("c8resnet18.equivision_in1k")
    write_model_folder(folder, "d4resnet18", timm.create_model("d4resnet18").state_dict(), {"model": "d4resnet18"})
    with pytest.raises(RuntimeError, match="holds 'd4resnet18'"):
        timm.create_model("c8resnet18", pretrained=True)


def test_the_configuration_keeps_no_local_path(folder, tmp_path):
    """A saved or uploaded config must not name a folder of this machine."""
    model = timm.create_model(NAME, pretrained=True)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert str(folder) not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == NAME
