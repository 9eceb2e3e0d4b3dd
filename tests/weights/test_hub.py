"""Published weights, as `create_model(name, pretrained=True)` loads them: huggingface_hub's download is replaced."""

import inspect

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.small_models import narrow

from equivision_timm.models import pretrained
from equivision_timm.models.pretrained import HUB_ORG, Published, WeightsError, hash_tensors, hub_id

NAME, TAG, COMMIT = "c4resnet18", "equivision_in1k", "0" * 40


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Published weights, and an empty weights folder."""
    with narrow(NAME):
        state = timm.create_model(NAME).state_dict()
        monkeypatch.setitem(pretrained.PUBLISHED, NAME, Published(COMMIT, hash_tensors(state)))
        monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path / "weights"))
        yield state


def create(**keywords):
    """The pretrained model, as if it had been published when timm's configurations were made."""
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": hub_id(NAME, TAG)}, **keywords)


def test_the_named_commit_is_loaded_and_checked(weights, tmp_path, monkeypatch):
    """A Hub that gives another file under the commit is noticed."""
    signature, calls, file = inspect.signature(huggingface_hub.hf_hub_download), [], tmp_path / "model.safetensors"

    def download(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return str(file)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    save_file(weights, file)
    loaded = create(cache_dir="cache").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    asked = {"repo_id": f"{HUB_ORG}/{NAME}.{TAG}", "filename": file.name, "revision": COMMIT, "cache_dir": "cache"}
    assert calls == [asked]
    assert not hasattr(create(features_only=True), "fc")
    save_file({**weights, "fc.bias": weights["fc.bias"] + 1}, file)
    with pytest.raises(WeightsError, match=f"{file}.*{hash_tensors(weights)}.*delete it"):
        create()
