"""`equivision-timm list`: the figures are those counted elsewhere, and the places those where weights are found."""

import json
import time
from pathlib import Path

import pytest
import timm

from equivision_timm.cli.list_models import list_models
from equivision_timm.cli.main import main
from equivision_timm.models import model_names, pretrained
from equivision_timm.models.pretrained import WEIGHTS_FILE, local_folder
from equivision_timm.weights.model_card import complexity


@pytest.fixture(autouse=True)
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    return tmp_path


def _row(name: str):
    (row,) = list_models(name)
    return row


@pytest.mark.parametrize("name", ["c1resnet18", "c8resnet50", "d1resnet18_fast", "d8resnet18_fast", "c8reresnet50"])
def test_counts_are_those_of_the_model_card(name: str) -> None:
    parameters, gmacs = complexity(name)
    row = _row(name)
    assert (row.parameters, row.size) == (parameters, 224)
    assert row.gmacs == pytest.approx(gmacs, rel=1e-12)


def test_counts_change_with_the_image() -> None:
    """Control: the digits' models have images of 65 pixels, and cost less than at 224."""
    row = _row("test_c8resnet")
    assert row.size == 65
    assert row.gmacs == complexity("test_c8resnet", 65)[1] < complexity("test_c8resnet")[1] / 5


@pytest.mark.parametrize("name", ["d4vit_tiny_patch16_224", "d4vit_small_patch16_full_224", "test_d4vit"])
def test_transformers_are_counted_as_on_their_cards(name: str) -> None:
    """Blocks that are alike count as often as there are, though one of them runs."""
    row = _row(name)
    parameters, gmacs = complexity(name, row.size)
    assert (row.parameters, row.gmacs) == (parameters, pytest.approx(gmacs, rel=1e-12))


def test_exact_sizes() -> None:
    assert _row("c8resnet18").exact_sizes == (193, 225)
    assert _row("c1resnet18").exact_sizes == (224, 224)
    (row,) = list_models("c8resnet18", near=257)
    assert row.exact_sizes == (257, 257)


def test_the_first_place_with_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _row("test_c8resnet").weights == "package"
    assert _row("c8resnet18_fast").weights == "none"
    assert _row("c8resnet18").weights == "fetch"
    monkeypatch.setitem(pretrained.PUBLISHED, "c8resnet18", pretrained.Published("0" * 40, "0" * 64))
    assert _row("c8resnet18").weights == "Hub"
    local_folder("c8resnet18").mkdir(parents=True)
    (local_folder("c8resnet18") / WEIGHTS_FILE).touch()
    assert _row("c8resnet18").weights == "local folder"


def test_all_models_within_seconds(capsys: pytest.CaptureFixture) -> None:
    """Processor time: the fused networks of `complexity` take eight times as much."""
    start = time.process_time()
    assert main(["list"]) == 0
    assert time.process_time() - start < 30
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "group", "fields"]
    assert [line.split()[0] for line in lines] == model_names()


def test_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "test_c[18]resnet", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["test_c1resnet", "test_c8resnet"]
    assert rows[1]["parameters"] == sum(p.numel() for p in timm.create_model("test_c8resnet").parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c8resnet19"], "no model is called 'c8resnet19': did you mean c8resnet18"),
        (["c8resnet18", "--near", "0"], "--near"),
        (["c8resnet18", "--near", "5"], "--near 5 is not possible for c8resnet18"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err
