"""`equivision-timm list`: counts, exact sizes, and the places of weights."""

import json
from pathlib import Path

import pytest
import timm
import torch

from equivision_timm.cli.list_models import Row, list_models
from equivision_timm.cli.main import main
from equivision_timm.layers import SteerableConv2d
from equivision_timm.models import model_names, pretrained
from equivision_timm.models.pretrained import WEIGHTS_FILE, local_folder


@pytest.fixture(autouse=True)
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))


def row(name: str, near: int = 224) -> Row:
    (found,) = list_models(name, near)
    return found


def test_operations_of_dense_convolutions_counted_by_hand() -> None:
    """Each output of a layer is a sum over its input channels and the pixels of its kernel."""
    model = timm.create_model("test_c8resnet").eval()
    channels, size, _ = model.pretrained_cfg["input_size"]
    counts = [model.fc.in_features * model.fc.out_features]

    def count(layer, inputs, y) -> None:
        counts.append(y.numel() * inputs[0].shape[1] * layer.kernel_size**2)

    for layer in model.modules():
        if isinstance(layer, SteerableConv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.rand(1, channels, size, size))
    found = row("test_c8resnet")
    assert found.dense_gmacs == pytest.approx(sum(counts) / 1e9, rel=1e-6)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.licence, found.weights) == ("mit", "package")


def test_operations_as_computed() -> None:
    """Block diagonal: fewer than dense ones in all families; of adapted models: times the views."""
    plain, vit = row("test_c1resnet"), row("d4vit_tiny_patch16_224")
    assert plain.gmacs == plain.dense_gmacs
    for found in (row("test_c8resnet"), vit, row("d4convnext_atto")):
        assert 0.15 * found.dense_gmacs < found.gmacs < 0.8 * found.dense_gmacs
    assert vit.dense_gmacs == pytest.approx(1.26, rel=0.02)  # of timm's vit_tiny_patch16_224
    views = row("c4sym_mobilenetv3_large_100")
    assert views.gmacs == 4 * views.dense_gmacs
    assert views.licence == "apache-2.0"
    assert row("test_d4vit").dense_gmacs is None


def test_exact_sizes() -> None:
    assert row("c8resnet18").exact_sizes == (193, 225)
    assert row("c1resnet18").exact_sizes == (224, 224)
    assert row("c8resnet18", 257).exact_sizes == (257, 257)


def test_the_first_place_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    none = row("c8resnet18_fast")
    assert (none.weights, none.licence) == ("none", "")
    assert row("c8resnet18").weights == "fetch"
    monkeypatch.setitem(pretrained.PUBLISHED, "c8resnet18", pretrained.Published("0" * 40, "0" * 64))
    assert row("c8resnet18").weights == "Hub"
    local_folder("c8resnet18").mkdir(parents=True)
    (local_folder("c8resnet18") / WEIGHTS_FILE).touch()
    assert row("c8resnet18").weights == "local folder"


def test_table_and_json(capsys: pytest.CaptureFixture) -> None:
    names = [name for name in model_names() if name.startswith("test_") and name.endswith("resnet")]
    assert main(["list", "test_*resnet"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "group", "fields"]
    assert [line.split()[0] for line in lines] == names
    assert main(["list", "test_*resnet", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names
    assert rows[1]["size"] == 65  # the model's own
