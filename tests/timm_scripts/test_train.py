"""timm's train.py with our models: its options, one process and two, killed and resumed."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from support.timm_runs import TRAINING, result
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


def _summary(folder: Path) -> list[dict[str, float]]:
    """The rows of train.py's summary.csv: an epoch each."""
    with (folder / "summary.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _assert_learns(folder: Path) -> None:
    epochs = _summary(folder)
    assert len(epochs) == 2
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"] < 5
    assert epochs[1]["lr"] == pytest.approx(epochs[0]["lr"] / 2)  # --sched step
    assert (folder / "model_best.pth.tar").is_file()


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("options", [[], OPTIONS, COMPILED], ids=["plain", "all", "compiled"])
def test_options(options: list[str], processes: int, run, textures: Path, tmp_path: Path) -> None:
    """In one process, and in two under torchrun."""
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", "out"]
    run("train.py", *TRAINING, *place, "--epochs", "2", *options, processes=processes)
    _assert_learns(tmp_path / "out")


def test_device_modules_instead_of_the_runner(scripts: Path, textures: Path, tmp_path: Path) -> None:
    place = ["--data-dir", str(textures), "--output", str(tmp_path), "--experiment", "out", "--epochs", "2", "-j", "1"]
    command = [sys.executable, str(scripts / "train.py"), "--device-modules", "equivision_timm", *TRAINING, *place]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_learns(tmp_path / "out")


# All images in one batch, unaugmented: the order of the data, which timm does not restore, cannot matter
WHOLE = ["--no-aug", "--decay-epochs", "4", "--lr", "0.02"]


def test_killed_and_resumed(run, scripts: Path, textures: Path, tmp_path: Path) -> None:
    """Killed without warning after some epochs, resumed from the last checkpoint: the losses of an unbroken run."""
    place = ["--data-dir", str(textures), "--output", str(tmp_path), "--epochs", "10", "-b", "96", *WHOLE]
    run("train.py", *TRAINING, *place, "--experiment", "unbroken")
    script = [sys.executable, "-m", "equivision_timm", str(scripts / "train.py")]
    command = [*script, *TRAINING, *place, "--experiment", "killed"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (tmp_path / "killed" / "checkpoint-3.pth.tar").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = len(_summary(tmp_path / "killed"))
    assert 4 <= done < 10
    run("train.py", *TRAINING, *place, "--experiment", "resumed", "--resume", tmp_path / "killed" / "last.pth.tar")
    unbroken, resumed = _summary(tmp_path / "unbroken"), _summary(tmp_path / "resumed")
    first = int(resumed[0]["epoch"])
    assert first in (done, done - 1)  # the checkpoint of the last epoch may not have been complete
    for name in ("train_loss", "eval_loss", "lr"):
        assert [row[name] for row in resumed] == pytest.approx([row[name] for row in unbroken[first:]], rel=1e-4)
    assert unbroken[first]["train_loss"] < 0.8 * unbroken[0]["train_loss"]


def test_fine_tuning_recipe_from_a_file(run, textures: Path, tmp_path: Path) -> None:
    """configs/finetune.yaml: pretrained weights from a file, other classes."""
    first = ["--data-dir", textures, "--output", tmp_path, "--experiment", "first", "--epochs", "1"]
    run("train.py", *TRAINING, *first, "--num-classes", "7")
    recipe = Path(__file__).parents[2] / "configs" / "finetune.yaml"
    small = ["--img-size", "33", "-b", "16", "-j", "0", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "0"]
    model = ["--model", "c4resnet18_fast", "--model-kwargs", "width=4", "--num-classes", "3"]
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", "second"]
    weights = ["--pretrained-path", tmp_path / "first" / "model_best.pth.tar"]
    done = run("train.py", "--config", recipe, *model, *place, *small, *weights)
    assert "validation" in result(done)[0]


@pytest.mark.parametrize(
    ("kind", "kwargs"), [("logit", []), ("feature", []), ("token", ["--model-kwargs", "distilled=True"])]
)
def test_distillation(kind: str, kwargs: list[str], run, textures: Path, tmp_path: Path) -> None:
    """A ViT learns from timm's ResNet; a student without a distillation token is refused where one is needed."""
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher", safe_serialization=True)
    small = ["--img-size", "64", "-b", "16", "-j", "0", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "0"]
    student = ["--model", "test_d4vit", "--num-classes", "3", "--lr", "0.01"]
    teacher = ["--kd-model-name", f"local-dir:{tmp_path / 'teacher'}", "--kd-distill-type", kind]
    place = ["--data-dir", textures, "--output", tmp_path, "--experiment", kind]
    run("train.py", *student, *small, *teacher, *place, *kwargs)
    losses = [row["train_loss"] for row in _summary(tmp_path / kind)]
    assert losses[1] < losses[0]
    if kwargs:
        with pytest.raises(AssertionError, match="distilled"):
            run("train.py", *student, *small, *teacher, *place)
