"""timm's other scripts on a trained checkpoint: validate, average, clean, infer, benchmark, export."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from support.timm_runs import TRAINING, result

MODEL = ["--model", "c4resnet18_fast", "--model-kwargs", "width=4", "--num-classes", "3"]
IMAGES = ["--img-size", "33", "--crop-pct", "1.0", "-b", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(run, textures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training run with an EMA."""
    out = tmp_path_factory.mktemp("trained")
    place = ["--data-dir", textures, "--output", out, "--experiment", "run", "--epochs", "4"]
    run("train.py", *TRAINING, *place, "--decay-epochs", "2")
    return out / "run"


@pytest.fixture(scope="module")
def reported(trained: Path) -> float:
    """The best top-1 that training reported."""
    with (trained / "summary.csv").open() as file:
        return max(float(row["eval_top1"]) for row in csv.DictReader(file))


@pytest.mark.parametrize("options", [[], ["--reparam"], ["--channels-last"]], ids=["plain", "reparam", "channels_last"])
def test_validate_gives_the_accuracy_of_training(
    options: list[str], run, trained: Path, reported: float, textures: Path
) -> None:
    checkpoint = ["--checkpoint", trained / "model_best.pth.tar"]
    top1 = result(run("validate.py", "--data-dir", textures, *MODEL, *IMAGES, "-j", "0", *checkpoint, *options))["top1"]
    assert top1 == pytest.approx(reported, abs=1e-3)
    assert top1 > 50  # of three classes: it has learnt something


def test_validate_under_rotation(run, trained: Path, textures: Path) -> None:
    checkpoint = ["--checkpoint", trained / "model_best.pth.tar", "--dataset", "torch/rotated_folder"]
    top1 = result(run("validate.py", "--data-dir", textures, *MODEL, *IMAGES, "-j", "0", *checkpoint))["top1"]
    assert 30 < top1 <= 100


def test_average_and_clean(run, trained: Path, reported: float, textures: Path, tmp_path: Path) -> None:
    """The mean of two checkpoints; then a checkpoint of weights only, which a model loads and which validates."""
    averaged = ["--output", tmp_path / "mean.safetensors", "--safetensors"]
    run("avg_checkpoints.py", "--input", trained, "--filter", "checkpoint-*", "-n", "2", *averaged)
    mean = timm.models.load_state_dict(str(tmp_path / "mean.safetensors"))
    best = run(
        "clean_checkpoint.py",
        *("--checkpoint", trained / "model_best.pth.tar"),
        *("--output", tmp_path / "clean.safetensors", "--safetensors", "--no-hash"),
        cwd=tmp_path,
    )
    assert "Saved state_dict" in best.stdout
    model = timm.create_model(
        "c4resnet18_fast", width=4, num_classes=3, checkpoint_path=str(tmp_path / "clean.safetensors")
    )
    assert mean.keys() == model.state_dict().keys()
    assert not torch.equal(mean["fc.weight"], model.fc.weight)
    assert not any("basis" in name for name in mean)
    checkpoint = ["--checkpoint", tmp_path / "clean.safetensors"]
    again = result(run("validate.py", "--data-dir", textures, *MODEL, *IMAGES, "-j", "0", *checkpoint))
    assert again["top1"] == pytest.approx(reported, abs=1e-3)


def test_inference(run, trained: Path, reported: float, textures: Path, tmp_path: Path) -> None:
    """A class for every image, as right as training reported."""
    options = [*MODEL, *IMAGES, "-j", "1", "--checkpoint", trained / "model_best.pth.tar", "--results-dir", tmp_path]
    run("inference.py", "--data-dir", textures, *options, "--label-type", "name", "--include-index", "--fullname")
    (file,) = tmp_path.glob("*.csv")
    with file.open() as rows:
        predictions = [(Path(row["filename"]).parent.name, int(row["index"])) for row in csv.DictReader(rows)]
    classes = ["brick", "grass", "gravel"]
    assert len(predictions) == 48
    right = sum(classes.index(name) == index for name, index in predictions)
    assert 100 * right / 48 == pytest.approx(reported, abs=1e-3)


def test_benchmark_alone_and_in_bulk(run, scripts: Path, tmp_path: Path) -> None:
    options = ["--img-size", "33", "-b", "2", "--device", "cpu", "--num-warm-iter", "1", "--num-bench-iter", "5"]
    single = result(run("benchmark.py", "--model", "c4resnet18_fast", *options, "--bench", "both"))
    assert single["infer_samples_per_sec"] > 0
    assert single["train_samples_per_sec"] > 0
    table = tmp_path / "table.csv"
    key = ["--sort-key", "infer_samples_per_sec"]
    # bulk_runner's --module takes a value, any, and then runs `python -m equivision_timm benchmark.py ...`
    bulk = ["--model-list", "c[14]resnet18_fast", "--results-file", table, *key, "--module=yes", "equivision_timm"]
    run("bulk_runner.py", *bulk, scripts / "benchmark.py", *options, "--bench", "inference")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"c1resnet18_fast", "c4resnet18_fast"}
    assert all(float(row["infer_samples_per_sec"]) > 0 for row in rows)


@pytest.mark.parametrize("exporter", [["--dynamo"], []], ids=["dynamo", "torchscript"])
def test_onnx_export_and_validate(exporter: list[str], run, textures: Path, tmp_path: Path) -> None:
    """A model of a standard shape (onnx_export takes no model arguments), with weights of its own."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    torch.manual_seed(0)
    model = timm.create_model("c4resnet18_fast", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = ["--model", "c4resnet18_fast", "--num-classes", "3", "--checkpoint", tmp_path / "weights.pth"]
    graph = tmp_path / "model.onnx"
    run("onnx_export.py", graph, *weights, "--img-size", "33", "-b", "16", "--reparam", "--check-forward", *exporter)
    flat = tmp_path / "images"
    shutil.copytree(textures / "validation", flat)
    done = run("onnx_validate.py", flat, "--onnx-input", graph, "--img-size", "33", "--crop-pct", "1.0", "-b", "16")
    exported = float((done.stdout + done.stderr).split("Prec@1 ")[-1].split()[0])
    options = ["--img-size", "33", "--crop-pct", "1.0", "--interpolation", "bicubic", "-b", "16", "--device", "cpu"]
    expected = result(run("validate.py", "--data-dir", flat, *weights, *options, "-j", "0"))["top1"]
    assert not math.isnan(exported)
    assert exported == pytest.approx(expected, abs=0.1)
