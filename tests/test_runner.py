"""`python -m equivision_timm SCRIPT.py`: the script runs as it would alone, with the models registered."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equivision_timm.cli.main import main

SCRIPT = """
import os, sys
import timm
import beside  # a module next to the script
line = f"{__name__} {sys.argv[1:]} {'c8resnet50' in timm.list_models()} {os.environ.get('RANK')}\\n"
sys.stdout.write(line)  # at once: two processes that write unbuffered do not mix their lines
if "--fail" in sys.argv:
    raise KeyError("the script's own error")
if "--exit" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "some_script.py"
    path.write_text(SCRIPT)
    return path


def _run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # as in many containers
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)


def test_runs_as_main_with_models_and_arguments(script: Path) -> None:
    done = _run("equivision_timm", str(script), "--lr", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "__main__ ['--lr', '0.1'] True None"


def test_errors_keep_traceback_and_status(script: Path) -> None:
    done = _run("equivision_timm", str(script), "--fail")
    assert done.returncode == 1
    assert "some_script.py" in done.stderr
    assert 'KeyError: "the script\'s own error"' in done.stderr


def test_exit_status_passes(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as stopped:
        main([str(script), "--exit"])
    assert stopped.value.code == 7


def test_torchrun(script: Path) -> None:
    done = _run("torch.distributed.run", "--nproc_per_node=2", "-m", "equivision_timm", str(script))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.split("\n") if "__main__" in line]
    assert sorted(line.split()[-1] for line in lines) == ["0", "1"]
    assert all("True" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_train.py", "'no_such_train.py' is neither a command .* nor a file"),
        ("timm", "'timm' is neither a command"),
        ("training", "'training' is neither a command"),
        (".", r"'.' is a folder, not a script: name a file in it, such as train.py"),
    ],
)
def test_what_is_no_script_gets_a_message(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert "git clone" in line
