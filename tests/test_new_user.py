"""scripts/new_user.py in a process and a folder of its own: every step works, and rotated images are alike."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ["pictures", "adapt", "fine-tune", "predict", "export", "deploy"]


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    pytest.importorskip("skimage", reason="the pictures of scripts/new_user.py come from scikit-image")
    variables = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "TEMP": str(folder)}  # where it makes its own
    command = [sys.executable, str(ROOT / "scripts" / "new_user.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    print(done.stdout, done.stderr[-3000:])
    return done


def _changes(done: subprocess.CompletedProcess) -> list[float]:
    """How much the probabilities of rotated images change: adapted, in predict, deployed."""
    changes = [float(value) for value in re.findall(r"[\d.]+e[+-]\d+(?= in )", done.stdout)]
    assert len(changes) == 3
    return changes


def _check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0
    assert re.findall(r"^(\S+) +[\d.]+ s  ", done.stdout, re.MULTILINE) == STEPS
    accuracies = [float(value) for value in re.findall(r"([\d.]+)%", done.stdout)]
    assert len(accuracies) == 2  # of predict and of what is deployed
    assert min(accuracies) > 60  # of three classes
    assert max(_changes(done)) < 1e-4


def test_from_a_folder_of_images_to_a_deployed_model(tmp_path: Path) -> None:
    _check(_run(tmp_path))


def test_with_timms_own_script(tmp_path: Path) -> None:
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip("needs timm's scripts: set TIMM_SCRIPTS to a clone of its repository")
    _check(_run(tmp_path, "--train-script", str(Path(os.environ["TIMM_SCRIPTS"], "train.py").resolve())))


def test_the_plain_twin_is_told_apart(tmp_path: Path) -> None:
    """The same steps with a network that is not equivariant end with an error."""
    done = _run(tmp_path, "--model", "test_c1resnet")
    assert done.returncode == 1
    assert min(_changes(done)[1:]) > 0.01
    assert done.stderr.endswith("rotated images do not get the same probabilities to 0.0001\n")
