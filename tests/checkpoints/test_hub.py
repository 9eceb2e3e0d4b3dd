"""Weights on (a loopback) Hub, as `create_model(name, pretrained=True)` sees them."""

import json

import pytest
import timm
import torch
from fresh_process import FreshProcess, create_pretrained
from hub_server import TOKEN, Hub
from safetensors.torch import load, save

from equivision_timm.models.pretrained import HUB_ORG

NAME = "c4resnet18"
REPOSITORY = f"{HUB_ORG}/{NAME}.equivision_in1k"
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
def start(hub, tmp_path):
    """Starts a process that creates pretrained models and knows nothing of the user's but the loopback Hub."""
    environment = {"HOME": tmp_path / "home", "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": 1}

    def start(*models, **variables):
        return FreshProcess({**environment, **variables}, create_pretrained, *(models or [(NAME, {})]))

    return start


@pytest.fixture
def run(start):
    return lambda *models, **variables: start(*models, **variables).result()


def test_first_download_then_cached_then_changed_then_offline(hub, run, first, second):
    downloads = ("GET", "/large/")
    ours, twice, adapted = run((NAME, {}), (NAME, {}), (f"{NAME}.equivision_in1k", {"features_only": True}))
    assert ours == twice == bias(first)
    assert adapted == 0  # no classifier, no error
    assert hub.count(*downloads) == 1

    hub.add(REPOSITORY, {FILE: second})
    assert run() == [bias(second)]
    assert hub.count(*downloads) == 2

    before = len(hub.requests)
    assert run(HF_HUB_OFFLINE=1) == [bias(second)]
    assert len(hub.requests) == before


def test_what_the_hub_may_refuse(hub, run, first):
    """404 for a file, 401 for a private repository and for one that does not exist: clear errors, then success."""
    hub.add(f"{HUB_ORG}/d1resnet18.equivision_in1k", {"README.md": b"# no weights yet"})
    hub.add(f"{HUB_ORG}/d4resnet18.equivision_in1k", {FILE: first}, private=True)
    results = run(("d1resnet18", {}), ("d4resnet18", {}), ("c8resnet18", {}))
    for name, answer, result in zip(
        ("d1resnet18", "d4resnet18", "c8resnet18"), ("404", "401", "401"), results, strict=True
    ):
        assert result.startswith(f"RuntimeError: no weights for {name}")
        assert answer in result
        assert f"{hub.endpoint}/{HUB_ORG}/{name}.equivision_in1k" in result
        assert f"`python -m equivision_timm fetch {name}`" in result


def test_where_the_cache_lies_and_who_may_read(hub, run, first, tmp_path):
    hub.repositories[REPOSITORY].private = True
    environment = {"HF_HUB_CACHE": tmp_path / "cache", "HF_TOKEN": TOKEN}
    assert run((NAME, {}), (NAME, {"cache_dir": str(tmp_path / "other")}), **environment) == [bias(first)] * 2
    for folder in ("cache", "other"):
        assert [path.read_bytes() == first for path in (tmp_path / folder).rglob(FILE)] == [True]
    assert not (tmp_path / "home").exists()


def test_the_local_folder_comes_first_but_not_for_hf_hub_names(hub, run, first, second, tmp_path):
    folder = tmp_path / "weights" / REPOSITORY.split("/")[1]
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(second)
    local, named = run((NAME, {}), (f"hf-hub:{REPOSITORY}", {}), EQUIVISION_TIMM_WEIGHTS=tmp_path / "weights")
    assert (local, named) == (bias(second), bias(first))


def test_a_connection_that_breaks_midway_is_continued(hub, run, first):
    hub.break_downloads_after = 2 * len(first) // 3
    (result,) = run()
    if result != bias(first):  # the oldest supported huggingface_hub leaves it to the next call to go on
        assert result.startswith(f"RuntimeError: no weights for {NAME}")
        assert run() == [bias(first)]
    starts = hub.offsets
    assert starts[0] == 0
    assert len(starts) > 1
    assert all(start > 0 for start in starts[1:])


def test_a_connection_that_stays_broken(hub, run, first, tmp_path):
    hub.break_downloads_after = 0
    cache = tmp_path / "cache"
    (result,) = run(HF_HUB_CACHE=cache)
    assert result.startswith(f"RuntimeError: no weights for {NAME}")
    assert list(cache.rglob(FILE)) == []
    hub.break_downloads_after = None
    assert run(HF_HUB_CACHE=cache) == [bias(first)]


def test_two_processes_at_once(hub, start, first):
    processes = [start(), start()]
    assert [process.result() for process in processes] == [[bias(first)]] * 2
