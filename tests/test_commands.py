"""Every command: bad arguments, damaged files and Ctrl-C end with one line, the right status, and nothing written."""

import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.small_models import save_small_model

import equivision_timm
import equivision_timm.cli.convert as convert_module
import equivision_timm.cli.demo as demo_module
import equivision_timm.cli.rotate_eval as rotate_eval_module
import equivision_timm.cli.show as show_module
from equivision_timm.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad inputs; read only."""
    root = tmp_path_factory.mktemp("inputs")
    save_small_model(root / "model", width=2)
    for name in ("a", "b", "c"):
        (root / "data" / name).mkdir(parents=True)
        Image.radial_gradient("L").resize((40, 40)).save(root / "data" / name / "image.png")
        (root / "damaged" / name).mkdir(parents=True)
        (root / "damaged" / name / "image.png").write_bytes(b"no picture")
    (root / "flat").mkdir()
    Image.new("L", (9, 9)).save(root / "flat" / "image.png")
    (root / "image.png").write_bytes((root / "data" / "a" / "image.png").read_bytes())
    (root / "empty.png").touch()
    (root / "folder.png").mkdir()
    (root / "text").write_text("text")
    (root / "map.pkl").write_bytes(b"nonsense")
    (root / "map.txt").write_text("x\n" * 9 + "a\nb\nc\n")
    (root / "results" / "results.json").mkdir(parents=True)
    (root / "foreign").mkdir()
    (root / "foreign" / "results.json").write_text('{"settings": [], "cells": 3}')
    torch.save({"weight": torch.ones(2)}, root / "other.pth")
    plain = timm.create_model("test_resnet", num_classes=3).state_dict()
    plain["fc.bias"][:] = float("nan")
    torch.save(plain, root / "nan.pth")
    return root


MODEL = "local-dir:model"
ROTATE_EVAL = ["rotate-eval", "--models", MODEL, "--data", "data", "-j", "0", "--device", "cpu", "--out", "out"]
SHOW = ["show", "image.png", "--model", MODEL, "--out", "show.png"]
BAD = [
    ([], "required: COMMAND"),
    (["--nope"], "unrecognized arguments|required: COMMAND"),
    (["nosuch"], "neither a command"),
    (["rotate-eval"], "--models"),
    ([*ROTATE_EVAL, "--nope"], "--nope"),
    ([*ROTATE_EVAL, "-j", "100000"], "--workers: '100000' is not possible: give a number from 0 to"),
    ([*ROTATE_EVAL, "-j", "-1"], "--workers"),
    ([*ROTATE_EVAL, "-b", "0"], "--batch-size"),
    ([*ROTATE_EVAL, "--size", "0"], "--size"),
    ([*ROTATE_EVAL, "--size", "100000"], "--size"),
    ([*ROTATE_EVAL, "--num-classes", "0"], "--num-classes"),
    ([*ROTATE_EVAL, "--num-classes", "7"], "3 classes, not 7"),
    ([*ROTATE_EVAL, "--device", "meta"], "--device meta cannot be used"),
    ([*ROTATE_EVAL, "--device", "nosuch"], "--device nosuch cannot be used"),
    ([*ROTATE_EVAL, "--angles=-1e308:1e308:1e-300"], "more than 3600 angles"),
    ([*ROTATE_EVAL, "--split", "nosuch"], "no sub-folder 'nosuch'"),
    ([*ROTATE_EVAL, "--class-map", "map.pkl"], "map.pkl|class map|pickle"),
    ([*ROTATE_EVAL, "--class-map", "map.txt"], r"gives class \d+, and .* has the classes 0 to 2"),
    ([*ROTATE_EVAL, "--data", "damaged"], "none of the 3 images in 'damaged' can be read, such as '.*image.png'"),
    ([*ROTATE_EVAL, "--data", "flat"], "not in class folders"),
    ([*ROTATE_EVAL, "--data", "text"], "no folder 'text'"),
    ([*ROTATE_EVAL, "--out", "text"], "cannot write text"),
    ([*ROTATE_EVAL, "--out", "results"], "is a folder"),
    ([*ROTATE_EVAL, "--out", "foreign"], "holds no results"),
    ([*ROTATE_EVAL, "--out", "x" * 300], "File name too long"),
    ([*ROTATE_EVAL, "--models", MODEL, "test_resnet=text"], "cannot load the weights of 'test_resnet=text'"),
    ([*ROTATE_EVAL, "--models", "test_resnet=other.pth"], "Is 'other.pth' a checkpoint"),
    ([*ROTATE_EVAL, "--models", "test_resnet=nan.pth"], "returns NaN"),
    ([*ROTATE_EVAL, "--models", "test_resnet="], "names no checkpoint"),
    ([*ROTATE_EVAL, "--models", "local-dir:nowhere"], "no folder 'nowhere'"),
    ([*ROTATE_EVAL, "--models", "two\nlines"], r"unknown model 'two\\nlines'"),
    ([*SHOW, "--model", "c8resnet18"], "no weights for c8resnet18.* fetch c8resnet18`; or give a file, c8resnet18="),
    ([*SHOW, "--out", "show"], "no ending of a picture"),
    ([*SHOW, "--out", "show.xyz"], "no ending of a picture"),
    ([*SHOW, "--out", "folder.png"], "is a folder"),
    ([*SHOW, "--out", "text/show.png"], "Not a directory"),
    ([*SHOW, "--angles", "0:359:1"], "give fewer --angles"),
    ([*SHOW, "--level", "9"], "no feature map --level 9"),
    ([*SHOW, "--level", "x"], "--level"),
    (["show", "empty.png", "--model", MODEL], "empty.png"),
    (["demo", "--out", "demo.xyz"], "no ending of a picture"),
    (["demo", "--out", "text/demo.png"], "Not a directory"),
    (["rotate_eval"], "there is no command 'rotate_eval': did you mean 'rotate-eval'"),
    (["Lsit"], "did you mean 'list'"),
    (["verfy", "model"], "did you mean 'verify'"),
    (["verify", "best.pth.tar"], "validate.py --model NAME --checkpoint best.pth.tar.*convert best.pth.tar"),
    (["convert", "other.pth", "--model", "resnet18", "--out", "out"], "no model of this package"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line(
    arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(show_module, "_draw_model", lambda *_: pytest.fail("work was done in vain"))
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", "no weights")
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    progress = re.compile(r"^$|\d/3 \[")
    lines = [line for line in capsys.readouterr().err.splitlines() if not progress.search(line)]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0])
    assert sorted(folder.rglob("*")) == before


def _interrupt(*_, **__) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (show_module, "load", SHOW),
        (demo_module, "load_digits", ["demo", "--out", "demo.png"]),
        (rotate_eval_module, "load", ROTATE_EVAL),
        (convert_module, "convert_file", ["convert", "other.pth", "--model", "c4resnet18", "--out", "out"]),
    ],
)
def test_ctrl_c(module, name: str, arguments: list[str], folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, name, _interrupt)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{arguments[0]}: interrupted; ")
    assert sorted(folder.rglob("*")) == before


def test_an_internal_error_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(show_module, "load", lambda *_: {}["missing\nkey"])
    assert main(SHOW) == 1
    assert capsys.readouterr().err == "show: KeyError: 'missing\\nkey'\n"


def test_full_disk_leaves_the_old_picture(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Files can grow to a thousand bytes only: what a full disk does, without one."""
    monkeypatch.chdir(folder)
    (tmp_path / "show.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status = main([*SHOW, "--angles", "0", "--out", str(tmp_path / "show.png")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "File too large" in line
    assert [path.name for path in tmp_path.iterdir()] == ["show.png"]
    assert (tmp_path / "show.png").read_bytes() == b"old"


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"equivision_timm {equivision_timm.__version__}, timm {timm.__version__}")


CONSOLE_SCRIPT = """
import sys
from {module} import {function}
sys.exit({function}())
"""


@pytest.fixture
def console_script(tmp_path: Path) -> Path:
    """What an installer makes of `[project.scripts]`."""
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (name, module, function) = re.search(r'\[project\.scripts\]\n(\S+) = "(\S+):(\S+)"', pyproject).groups()
    path = tmp_path / name
    path.write_text(CONSOLE_SCRIPT.format(module=module, function=function))
    return path


def test_console_script(console_script: Path) -> None:
    """Passes the exit status on, and calls itself by its name."""
    path = str(Path(equivision_timm.__file__).parents[1])
    words = [sys.executable, str(console_script), "lst"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "equivision_timm: there is no command 'lst': did you mean 'list'? (see equivision-timm --help)\n"
    )


def test_a_file_named_like_a_command_is_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Only where no such file exists a near command is suggested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "lists").write_text("print('the script')")
    assert main(["lists"]) == 0
    assert capsys.readouterr().out == "the script\n"


def test_output_of_few_letters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the encoding of stdout lacks is written out, as in a pipe under Windows."""
    (tmp_path / "ü🌀.png").write_bytes((folder / "image.png").read_bytes())
    monkeypatch.chdir(folder)
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "latin-1"))
    assert main(["predict", str(tmp_path), "--model", MODEL]) == 0
    assert "/ü\\U0001f300.png,1,".encode("latin-1") in output.getvalue()


def test_a_closed_pipe_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What `| head` does when it has seen enough."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["verify", str(tmp_path / "missing")]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
