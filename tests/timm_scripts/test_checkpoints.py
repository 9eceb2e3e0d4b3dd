"""timm's other scripts on a trained checkpoint: validate, average, clean, infer, benchmark, export."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from support.timm_runs import IMAGES, MODEL, TRAINING, result, rows


@pytest.fixture(scope="module")
def trained(run, textures, tmp_path_factory):
    """The output folder of a training run with an EMA."""
    out = tmp_path_factory.mktemp("trained")
    place = ["--data-dir", textures, "--output", out, "--experiment", "run", "--epochs", "4"]
    run("train.py", *TRAINING, *place, "--decay-epochs", "2")
    return out / "run"


@pytest.fixture(scope="module")
def reported(trained):
    """The best top-1 that training reported."""
    return max(float(row["eval_top1"]) for row in rows(trained / "summary.csv"))


@pytest.fixture
def top1(run, trained, textures):
    """`top1(*options)`: accuracy by validate.py of the best checkpoint, or of that in the options."""
    common = ["--data-dir", textures, *MODEL, *IMAGES, "--checkpoint", trained / "model_best.pth.tar"]
    return lambda *options: result(run("validate.py", *common, *options))["top1"]


@pytest.mark.parametrize("options", [[], ["--reparam"], ["--channels-last"]], ids=["plain", "reparam", "channels_last"])
def test_validate_gives_the_accuracy_of_training(options, top1, reported):
    found = top1(*options)
    assert found == pytest.approx(reported, abs=1e-3)
    assert found > 50  # of three classes: it has learnt something


def test_validate_under_rotation(top1):
    assert 30 < top1("--dataset", "torch/rotated_folder") <= 100


def test_average_and_clean(run, trained, reported, top1, tmp_path):
    """The mean of two checkpoints; then a checkpoint of weights only, which a model loads and which validates."""
    averaged, clean = tmp_path / "mean.safetensors", tmp_path / "clean.safetensors"
    run(
        "avg_checkpoints.py",
        *("--input", trained, "--filter", "checkpoint-*", "-n", "2", "--output", averaged, "--safetensors"),
    )
    mean = timm.models.load_state_dict(str(averaged))
    weights = ["--checkpoint", trained / "model_best.pth.tar", "--output", clean, "--safetensors", "--no-hash"]
    assert "Saved state_dict" in run("clean_checkpoint.py", *weights, cwd=tmp_path).stdout
    model = timm.create_model("c4resnet18_fast", width=4, num_classes=3, checkpoint_path=str(clean))
    assert mean.keys() == model.state_dict().keys()
    assert not torch.equal(mean["fc.weight"], model.fc.weight)
    assert not any("basis" in name for name in mean)
    assert top1("--checkpoint", clean) == pytest.approx(reported, abs=1e-3)


def test_inference(run, trained, reported, textures, tmp_path):
    """A class for every image, with the accuracy that training reported."""
    options = [*MODEL, *IMAGES, "-j", "1", "--checkpoint", trained / "model_best.pth.tar", "--results-dir", tmp_path]
    run("inference.py", "--data-dir", textures, *options, "--label-type", "name", "--include-index", "--fullname")
    (file,) = tmp_path.glob("*.csv")
    predictions = [(Path(row["filename"]).parent.name, int(row["index"])) for row in rows(file)]
    assert len(predictions) == 48
    right = sum(["brick", "grass", "gravel"].index(name) == index for name, index in predictions)
    assert 100 * right / 48 == pytest.approx(reported, abs=1e-3)


def test_benchmark_alone_and_in_bulk(run, timm_scripts, tmp_path):
    options = ["--img-size", "33", "-b", "2", "--device", "cpu", "--num-warm-iter", "1", "--num-bench-iter", "5"]
    single = result(run("benchmark.py", "--model", "c4resnet18_fast", *options, "--bench", "both"))
    assert min(single["infer_samples_per_sec"], single["train_samples_per_sec"]) > 0
    table = tmp_path / "table.csv"
    key = ["--sort-key", "infer_samples_per_sec"]
    # bulk_runner's --module takes a value, any, and then runs `python -m equivision_timm benchmark.py ...`
    bulk = ["--model-list", "c[14]resnet18_fast", "--results-file", table, *key, "--module=yes", "equivision_timm"]
    run("bulk_runner.py", *bulk, timm_scripts / "benchmark.py", *options, "--bench", "inference")
    assert {row["model"] for row in rows(table)} == {"c1resnet18_fast", "c4resnet18_fast"}
    assert all(float(row["infer_samples_per_sec"]) > 0 for row in rows(table))


@pytest.mark.parametrize("exporter", [["--dynamo"], []], ids=["dynamo", "torchscript"])
def test_onnx_export_and_validate(exporter, run, textures, tmp_path):
    """A model of a standard shape (onnx_export takes no model arguments), with weights of its own."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    model = timm.create_model("c4resnet18_fast", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = ["--model", "c4resnet18_fast", "--num-classes", "3", "--checkpoint", tmp_path / "weights.pth"]
    graph, flat = tmp_path / "model.onnx", tmp_path / "images"
    run("onnx_export.py", graph, *weights, "--img-size", "33", "-b", "16", "--reparam", "--check-forward", *exporter)
    shutil.copytree(textures / "validation", flat)
    done = run("onnx_validate.py", flat, "--onnx-input", graph, "--img-size", "33", "--crop-pct", "1.0", "-b", "16")
    exported = float((done.stdout + done.stderr).split("Prec@1 ")[-1].split()[0])
    expected = result(run("validate.py", "--data-dir", flat, *weights, *IMAGES, "--interpolation", "bicubic"))["top1"]
    assert exported == pytest.approx(expected, abs=0.1)
