"""scripts/new_user.py: every step works, and rotated images get the same probabilities."""

import contextlib
import io
import re
import sys

import pytest

from equivision_timm.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # inside torch.onnx
    pytest.mark.filterwarnings("ignore:unclosed file"),  # inside timm's datasets
]
STEPS = ["pictures", "adapt", "fine-tune", "predict", "export", "deploy"]


def command(*words):
    """What `equivision-timm WORDS` prints, here instead of in a new process, which would import PyTorch again."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(list(words)) == 0
    return printed.getvalue()


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns the exit status; accuracies, in percent; changes of the probabilities of rotated images."""
    for library in ("onnx", "onnxscript", "onnxruntime", "skimage"):
        pytest.importorskip(library, reason=f"scripts/new_user.py needs {library}")
    import new_user

    def start(*arguments, epochs=new_user.EPOCHS):
        monkeypatch.setattr(new_user, "EPOCHS", epochs)
        monkeypatch.setattr(new_user, "equivision_timm_command", command)
        monkeypatch.setattr(sys, "argv", ["new_user.py", *arguments])
        status, printed = new_user.main(), capsys.readouterr().out
        assert re.findall(r"^(\S+) +[\d.]+ s  ", printed, re.MULTILINE) == STEPS
        accuracies, changes = (re.findall(pattern, printed) for pattern in (r"([\d.]+)%", r"[\d.]+e[+-]\d+(?= in )"))
        return status, [float(value) for value in accuracies], [float(value) for value in changes]

    return start


@pytest.mark.parametrize("by_timm", [False, True])
def test_from_a_folder_of_images_to_a_deployed_model(by_timm, run, request):
    script = ["--train-script", str(request.getfixturevalue("timm_scripts") / "train.py")] if by_timm else []
    status, accuracies, changes = run(*script)
    assert status == 0
    assert len(accuracies) == 2  # of predict and of what is deployed
    assert min(accuracies) > 60  # of three classes
    assert len(changes) == 3  # adapted, in predict, deployed
    assert max(changes) < 1e-4


def test_the_plain_twin_is_noticed(run):
    """The same steps with a network that is not equivariant end with an error."""
    status, _, changes = run("--model", "test_c1resnet", epochs=1)
    assert status == 1
    assert min(changes[1:]) > 0.01
