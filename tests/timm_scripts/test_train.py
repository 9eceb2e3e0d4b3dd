"""timm's train.py with models of this package: its options, one process and two, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from support.timm_runs import IMAGES, MODEL, TRAINING, result, rows
from timm.layers import convert_sync_batchnorm
from timm.models import save_for_hf

OPTIONS = [
    *("--model-ema", "--model-ema-decay", "0.5"),
    *("--grad-accum-steps", "2"),
    "--grad-checkpointing",
    "--channels-last",
    *("--amp", "--amp-dtype", "bfloat16"),
    *("--drop-path", "0.1"),
    *("--bn-momentum", "0.05", "--bn-eps", "1e-4"),
    *("--dataset", "torch/rotated_folder"),
]

COMPILED = ["--torchcompile", *(option for option in OPTIONS if option != "--grad-checkpointing")]


def summary(folder):
    return [{name: float(value) for name, value in row.items()} for row in rows(folder / "summary.csv")]


def assert_learns(folder):
    epochs = summary(folder)
    assert len(epochs) == 2
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"] < 5
    assert epochs[1]["lr"] == pytest.approx(epochs[0]["lr"] / 2)  # --sched step
    assert (folder / "model_best.pth.tar").is_file()


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("options", [[], OPTIONS, COMPILED], ids=["plain", "all", "compiled"])
def test_options(options, processes, run, textures, tmp_path):
    """In one process, and in two under torchrun."""
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", "out"]
    run("train.py", *TRAINING, *place, "--epochs", "2", *options, processes=processes)
    assert_learns(tmp_path / "out")


def test_device_modules_instead_of_the_runner(timm_scripts, textures, tmp_path):
    place = ["--data-dir", str(textures), "--output", str(tmp_path), "--experiment", "out", "--epochs", "2", "-j", "1"]
    command = [sys.executable, str(timm_scripts / "train.py"), "--device-modules", "equivision_timm", *TRAINING, *place]
    subprocess.run(command, check=True)
    assert_learns(tmp_path / "out")


# All images in one batch, unaugmented: the order of the data, which timm does not restore, cannot matter
WHOLE = ["--no-aug", "--decay-epochs", "4", "--lr", "0.02"]


def test_killed_and_resumed(run, timm_scripts, textures, tmp_path):
    """Killed after some epochs, resumed from the last checkpoint: the losses of an unbroken run."""
    place = ["--data-dir", str(textures), "--output", str(tmp_path), "--epochs", "10", "-b", "96", *WHOLE]
    run("train.py", *TRAINING, *place, "--experiment", "unbroken")
    script = [sys.executable, "-m", "equivision_timm", str(timm_scripts / "train.py")]
    command = [*script, *TRAINING, *place, "--experiment", "killed"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (tmp_path / "killed" / "checkpoint-3.pth.tar").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = len(summary(tmp_path / "killed"))
    assert 4 <= done < 10
    run("train.py", *TRAINING, *place, "--experiment", "resumed", "--resume", tmp_path / "killed" / "last.pth.tar")
    unbroken, resumed = summary(tmp_path / "unbroken"), summary(tmp_path / "resumed")
    first = int(resumed[0]["epoch"])
    assert first in (done, done - 1)  # the checkpoint of the last epoch may not have been complete
    for name in ("train_loss", "eval_loss", "lr"):
        assert [row[name] for row in resumed] == pytest.approx([row[name] for row in unbroken[first:]], rel=1e-3)
    assert unbroken[first]["train_loss"] < 0.8 * unbroken[0]["train_loss"]


def test_fine_tuning_recipe_from_a_file(run, textures, tmp_path):
    """configs/finetune.yaml: pretrained weights from a file, other classes."""
    first = ["--data-dir", textures, "--output", tmp_path, "--experiment", "first", "--epochs", "1"]
    run("train.py", *TRAINING, *first, "--num-classes", "7")
    recipe = Path(__file__).parents[2] / "configs" / "finetune.yaml"
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", "second", "--epochs", "2"]
    weights = ["--pretrained-path", tmp_path / "first" / "model_best.pth.tar", "--warmup-epochs", "0"]
    done = run("train.py", "--config", recipe, *MODEL, *IMAGES, *place, *weights)
    assert "validation" in result(done)[0]


@pytest.mark.parametrize(
    ("kind", "kwargs"), [("logit", []), ("feature", []), ("token", ["--model-kwargs", "distilled=True"])]
)
def test_distillation(kind, kwargs, run, textures, tmp_path):
    """A ViT learns from timm's ResNet; a student without a distillation token is refused if one is needed."""
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher", safe_serialization=True)
    small = ["--img-size", "64", "-b", "16", "-j", "0", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "0"]
    student = ["--model", "test_d4vit", "--num-classes", "3", "--lr", "0.01"]
    teacher = ["--kd-model-name", f"local-dir:{tmp_path / 'teacher'}", "--kd-distill-type", kind]
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", kind]
    run("train.py", *student, *small, *teacher, *place, *kwargs)
    losses = [row["train_loss"] for row in summary(tmp_path / kind)]
    assert losses[1] < losses[0]
    if kwargs:
        with pytest.raises(AssertionError, match="distilled"):
            run("train.py", *student, *small, *teacher, *place)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm trains on GPUs only, and there is none")
@torch.no_grad()
def test_sync_bn_of_one_process_is_batch_norm():
    """`--sync-bn`; tests/timm_contract has the conversion."""
    model = timm.create_model("d4resnet18_fast", num_classes=5).train().cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    expected = model(images)
    torch.testing.assert_close(convert_sync_batchnorm(model)(images), expected, atol=1e-4, rtol=1e-4)
