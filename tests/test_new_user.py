"""scripts/new_user.py: every step works, and rotated images get the same probabilities."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from equivision_timm.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # inside torch.onnx
    pytest.mark.filterwarnings("ignore:unclosed file"),  # inside timm's datasets
]
STEPS = ["pictures", "adapt", "fine-tune", "predict", "export", "deploy"]


def command(*words: str) -> str:
    """What `equivision-timm WORDS` prints, here instead of in a new process, which would import PyTorch again."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(list(words)) == 0
    return printed.getvalue()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`run(*arguments)`: exit status, accuracies of predict and of what is deployed in percent, changes of the
    probabilities of rotated images: adapted, in predict, deployed."""
    for library in ("onnx", "onnxscript", "onnxruntime", "skimage"):
        pytest.importorskip(library, reason=f"scripts/new_user.py needs {library}")
    import new_user

    def start(*arguments: str, epochs: int = new_user.EPOCHS) -> tuple[int, list[float], list[float]]:
        monkeypatch.setattr(new_user, "EPOCHS", epochs)
        monkeypatch.setattr(new_user, "equivision_timm_command", command)
        monkeypatch.setattr(sys, "argv", ["new_user.py", *arguments])
        status = new_user.main()
        printed = capsys.readouterr().out
        assert re.findall(r"^(\S+) +[\d.]+ s  ", printed, re.MULTILINE) == STEPS
        accuracies, changes = (re.findall(pattern, printed) for pattern in (r"([\d.]+)%", r"[\d.]+e[+-]\d+(?= in )"))
        return status, [float(value) for value in accuracies], [float(value) for value in changes]

    return start


def test_from_a_folder_of_images_to_a_deployed_model(run) -> None:
    status, accuracies, changes = run()
    assert status == 0
    assert len(accuracies) == 2
    assert min(accuracies) > 60  # of three classes
    assert len(changes) == 3
    assert max(changes) < 1e-4


def test_with_timms_own_script(timm_scripts: Path, run) -> None:
    status, accuracies, changes = run("--train-script", str(timm_scripts / "train.py"))
    assert status == 0
    assert min(accuracies) > 60
    assert max(changes) < 1e-4


def test_the_plain_twin_is_noticed(run) -> None:
    """The same steps with a network that is not equivariant end with an error."""
    status, _, changes = run("--model", "test_c1resnet", epochs=1)
    assert status == 1
    assert min(changes[1:]) > 0.01
