"""Published weights on a Hub on loopback, as `create_model(name, pretrained=True)` loads them."""

import pytest
import timm
import torch
from safetensors.torch import load, save
from support.fresh_process import in_fresh_process
from support.hub_server import Hub, list_and_create_published

from equivision_timm.models.pretrained import HUB_ORG, hash_tensors

NAME = "c4resnet18"
TAGGED = f"{NAME}.equivision_in1k"
REPOSITORY = f"{HUB_ORG}/{TAGGED}"
FILE = "model.safetensors"


def weights(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(timm.create_model(NAME).state_dict())


def bias(content: bytes) -> float:
    return load(content)["fc.bias"].sum().item()


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Creates pretrained models in a process with an empty home folder: the list of timm, and what was created."""
    environment = {"HOME": tmp_path / "home", "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": 1}

    def run(published, *models, **variables):
        arguments = (published, *(models or [(NAME, {})]))
        return in_fresh_process({**environment, **variables}, list_and_create_published, *arguments)

    return run


def test_the_named_commit_is_loaded_cached_and_checked(hub, run, tmp_path):
    """A Hub that gives another file under the commit is noticed, and once it is mended, all is well."""
    first, second = weights(1), weights(2)
    commit = hub.add(REPOSITORY, {FILE: first})
    published = {NAME: (commit, hash_tensors(load(first)))}
    listed, results = run(published, (NAME, {}), (TAGGED, {"features_only": True}))
    assert results == [bias(first), 0]  # no classifier, no error
    assert [name for name in listed if "." in name] == [TAGGED]
    assert sum(method == "GET" and "/large/" in path for method, path in hub.requests) == 1
    hub.add(REPOSITORY, {FILE: second})  # another commit: not the one that the package names
    assert run(published, HF_HUB_OFFLINE=1)[1] == [bias(first)]

    hub.commits[REPOSITORY][commit] = {FILE: second}
    (result,) = run(published, HF_HUB_CACHE=tmp_path / "cache")[1]
    (copy,) = (tmp_path / "cache").rglob(FILE)
    for part in ("WeightsError", str(copy), published[NAME][1], hash_tensors(load(second)), "delete it"):
        assert part in result
    hub.commits[REPOSITORY][commit] = {FILE: first}
    copy.unlink()
    assert run(published, HF_HUB_CACHE=tmp_path / "cache")[1] == [bias(first)]


def test_errors_of_the_hub(hub, run):
    """404 for a file, 401 for a repository that is private or does not exist."""
    commits = {"d1resnet18": hub.add(f"{HUB_ORG}/d1resnet18.equivision_in1k", {"README.md": b""}), NAME: "0" * 40}
    _, results = run({name: (commit, "0" * 64) for name, commit in commits.items()}, *((name, {}) for name in commits))
    for (name, commit), answer, result in zip(commits.items(), ("404", "401"), results, strict=True):
        address = f"{hub.endpoint}/{HUB_ORG}/{name}.equivision_in1k"
        assert [part for part in (answer, address, commit) if part not in result] == []
