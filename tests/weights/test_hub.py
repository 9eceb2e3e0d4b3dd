"""Published weights on a Hub on loopback, as `create_model(name, pretrained=True)` loads them."""

import json

import pytest
import timm
import torch
from safetensors.torch import load, save
from support.fresh_process import FreshProcess
from support.hub_server import Hub, list_and_create_published

from equivision_timm.models.pretrained import HUB_ORG
from equivision_timm.models.tensor_hash import hash_tensors

NAME = "c4resnet18"
TAGGED = f"{NAME}.equivision_in1k"
REPOSITORY = f"{HUB_ORG}/{TAGGED}"
FILE = "model.safetensors"


def weights(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(timm.create_model(NAME).state_dict())


def bias(content: bytes) -> float:
    return load(content)["fc.bias"].sum().item()


@pytest.fixture(scope="module")
def first():
    return weights(1)


@pytest.fixture(scope="module")
def second():
    return weights(2)


@pytest.fixture
def hub(first):
    with Hub() as hub:
        hub.add(REPOSITORY, {FILE: first, "config.json": json.dumps({"architecture": NAME}).encode()})
        yield hub


@pytest.fixture
def published(hub, first):
    """`PUBLISHED`: {name: (commit, hash of the tensors)}."""
    return {NAME: (hub.repositories[REPOSITORY].head, hash_tensors(load(first)))}


@pytest.fixture
def run(hub, published, tmp_path):
    """Creates pretrained models in a process with an empty home folder: the list of timm, and what was created."""
    environment = {"HOME": tmp_path / "home", "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": 1}

    def run(*models, **variables):
        arguments = (published, *(models or [(NAME, {})]))
        return FreshProcess({**environment, **variables}, list_and_create_published, *arguments).result()

    return run


def test_first_download_then_cached_though_the_hub_goes_on(hub, run, first, second):
    downloads = ("GET", "/large/")
    listed, results = run((NAME, {}), (NAME, {}), (TAGGED, {"features_only": True}))
    assert results == [bias(first), bias(first), 0]  # no classifier, no error
    assert [name for name in listed if "." in name] == [TAGGED]
    assert hub.count(*downloads) == 1

    hub.add(REPOSITORY, {FILE: second})  # another commit: not the one that the package names
    before = sum(NAME in path for _, path in hub.requests)
    assert run()[1] == run(HF_HUB_OFFLINE=1)[1] == [bias(first)]
    assert sum(NAME in path for _, path in hub.requests) == before


def test_other_tensors_than_the_package_names(hub, run, published, second, tmp_path):
    """A Hub that gives another file under the commit; once the copy is deleted and the Hub mended, all is well."""
    commit, sha256 = published[NAME]
    right = hub.repositories[REPOSITORY].commits[commit]
    hub.repositories[REPOSITORY].commits[commit] = {**right, FILE: second}
    (result,) = run(HF_HUB_CACHE=tmp_path / "cache")[1]
    (copy,) = (tmp_path / "cache").rglob(FILE)
    for part in ("WeightsError", str(copy), sha256, hash_tensors(load(second)), "delete it"):
        assert part in result
    hub.repositories[REPOSITORY].commits[commit] = right
    copy.unlink()
    assert run(HF_HUB_CACHE=tmp_path / "cache")[1] == [bias(right[FILE])]


def test_errors_of_the_hub(hub, run, first, published):
    """404 for a file, 401 for a private repository and for one that does not exist."""
    private = f"{HUB_ORG}/d4resnet18.equivision_in1k"
    commits = {
        "d1resnet18": hub.add(f"{HUB_ORG}/d1resnet18.equivision_in1k", {"README.md": b"# no weights yet"}),
        "d4resnet18": hub.add(private, {FILE: first}, private=True),
        "c8resnet18": "0" * 40,
    }
    published |= {name: (commit, "0" * 64) for name, commit in commits.items()}
    _, results = run(*((name, {}) for name in commits))
    for (name, commit), answer, result in zip(commits.items(), ("404", "401", "401"), results, strict=True):
        address = f"{hub.endpoint}/{HUB_ORG}/{name}.equivision_in1k"
        assert [part for part in ("WeightsError", answer, address, commit, f"fetch {name}") if part not in result] == []
