"""All commands: bad input, damaged files and Ctrl-C end with one line, the right status, and nothing written."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.small_models import save_small_model, save_training

import equivision_timm
from equivision_timm.cli import demo, predict, rotate_eval, show
from equivision_timm.cli.main import main
from equivision_timm.errors import install_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad inputs; read only."""
    root = tmp_path_factory.mktemp("inputs")
    save_small_model(root / "model", width=2)
    save_training(root, width=1)
    (root / "nothing").mkdir()
    for name in ("a", "b", "c"):
        (root / "data" / name).mkdir(parents=True)
        Image.radial_gradient("L").resize((40, 40)).save(root / "data" / name / "image.png")
        (root / "damaged" / name).mkdir(parents=True)
        (root / "damaged" / name / "image.png").write_bytes(b"no picture")
    (root / "flat").mkdir()
    Image.new("L", (9, 9)).save(root / "flat" / "image.png")
    (root / "image.png").write_bytes((root / "data" / "a" / "image.png").read_bytes())
    (root / "folder.png").mkdir()
    (root / "text").write_text("text")
    (root / "old.csv").write_text("old")
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
PREDICT = ["predict", "--model", MODEL]
BAD = [
    ([], "COMMAND"),
    (["rotate_eval"], "rotate-eval"),
    (["list", "--nope"], "--nope"),
    ([*ROTATE_EVAL, "-b", "0"], "--batch-size"),
    ([*ROTATE_EVAL, "-b", "many"], "'many'"),
    ([*ROTATE_EVAL, "--device", "nosuch"], "'nosuch' cannot be used.*use cpu"),
    (["predict", "nosuch.png", "--model", MODEL], "no picture in nosuch.png"),
    ([*ROTATE_EVAL, "--num-classes", "7"], "3 classes, not 7"),
    ([*ROTATE_EVAL, "--angles", "0:9:0"], "angles"),
    ([*ROTATE_EVAL, "--split", "nosuch"], "no folder 'data/nosuch'"),
    ([*ROTATE_EVAL, "--class-map", "map.pkl"], "map.pkl"),
    ([*ROTATE_EVAL, "--class-map", "map.txt"], r"class \d+, .* classes 0 to 2"),
    ([*ROTATE_EVAL, "--data", "flat"], "the folder 0 sub-folders"),
    ([*ROTATE_EVAL, "--data", "text"], "no folder 'text'"),
    ([*ROTATE_EVAL, "--out", "text"], "cannot write text"),
    ([*ROTATE_EVAL, "--out", "results"], "cannot write results/results.json"),
    ([*ROTATE_EVAL, "--out", "foreign"], "holds no results"),
    ([*ROTATE_EVAL, "--models", "test_resnet=other.pth"], "'other.pth' a checkpoint"),
    ([*ROTATE_EVAL, "--models", "test_resnet=nan.pth"], "finite"),
    ([*ROTATE_EVAL, "--models", "test_resnet="], "No such file"),
    ([*ROTATE_EVAL, "--models", "two\nlines"], r"unknown model 'two\\nlines'"),
    ([*ROTATE_EVAL, "--models", "resnet10t"], "resnet10t=CHECKPOINT"),
    ([*ROTATE_EVAL, "--models", "c8resnet19"], "did you mean c8resnet18"),
    ([*ROTATE_EVAL, "--models", "resnet10t.no_such_tag"], "no_such_tag"),
    ([*SHOW, "--model", "c8resnet18"], "fetch c8resnet18`.*c8resnet18=CHECKPOINT"),
    ([*SHOW, "--out", "show.xyz"], "xyz"),
    ([*SHOW, "--out", "text/show.png"], "cannot write"),
    (["show", "nowhere.png", "--model", MODEL], "'nowhere.png'"),
    (["configs", "text"], "cannot write"),
    (["list", "c8resnet19"], "did you mean c8resnet18"),
    (["tune", "test_c8rsnet"], "did you mean test_c8resnet"),
    (["export", "test_c8resnet", "folder.png"], "cannot write folder.png"),
    (["export", "test_d4vit", "m.onnx", "--size", "33"], "33"),
    ([*PREDICT, "image.png", "--out", "nothing"], "cannot write nothing"),
    ([*PREDICT, "image.png", "--class-map", "nothing"], "no folder 'nothing'"),
    ([*PREDICT, "image.png", "--class-map", "text"], "--class-map has 1 names, and .* has 3 classes"),
    (
        [*PREDICT, "image.png", "--model", "c8resnet18_fast=model_best.pth.tar"],
        "checkpoint of 'c4resnet18_fast'",
    ),
    (["fetch", "resnet18"], "no weights of resnet18"),
    (["convert", "other.pth", "--model", "resnet18", "--out", "out"], "checkpoints of 'resnet18'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line(arguments: list[str], message: str, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "classify", lambda *_: pytest.fail("work was done in vain"))
    monkeypatch.setattr(show, "_draw_model", lambda *_: pytest.fail("work was done in vain"))
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", "no weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no cache")
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    progress = re.compile(r"^\s*$|\d/\d \[|left out")
    lines = [line for line in capsys.readouterr().err.splitlines() if not progress.search(line)]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("words", [[*ROTATE_EVAL, "--data", "damaged"], [*PREDICT, "damaged", "--out", "old.csv"]])
def test_no_image_can_be_read(words: list[str], folder: Path, monkeypatch, capsys) -> None:
    """They are reported, and nothing is written."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(words) == 1
    assert "left out" in "".join(capsys.readouterr())
    assert sorted(folder.rglob("*")) == before
    assert (folder / "old.csv").read_text() == "old"


def interrupt(*_, **__) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (show, "load", SHOW),
        (predict, "_classify", [*PREDICT, "image.png", "--out", "old.csv"]),
        (rotate_eval, "load", ROTATE_EVAL),
    ],
)
def test_ctrl_c(module, name: str, arguments: list[str], folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, name, interrupt)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"{arguments[0]}: interrupted"
    assert (folder / "old.csv").read_text() == "old"
    assert sorted(folder.rglob("*")) == before


def test_an_internal_error_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(show, "load", lambda *_: {}["missing\nkey"])
    assert main(SHOW) == 1
    assert capsys.readouterr().err == "show: KeyError: 'missing\\nkey'\n"


def test_output_of_an_encoding_without_the_characters(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """As in a pipe under Windows."""
    (tmp_path / "ü🌀.png").write_bytes((folder / "image.png").read_bytes())
    monkeypatch.chdir(folder)
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "latin-1"))
    assert main(["predict", str(tmp_path), "--model", MODEL]) == 0
    assert "/ü\\U0001f300.png,1,".encode("latin-1") in output.getvalue()


def test_a_closed_pipe_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Such as `| head` leaves."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["verify", str(tmp_path / "missing")]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


# Scripts of timm

SCRIPT = """
import sys
import timm
import beside  # a module next to the script
print(f"{__name__} {sys.argv[1:]} {'c8resnet50' in timm.list_models()}")
raise KeyError("the script's own error")
"""


def test_scripts_run_as_main_with_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Their errors pass through."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "lists").write_text(SCRIPT)  # nearly the name of a command
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(KeyError, match="own error"):
        main([str(tmp_path / "lists"), "--lr", "0.1"])
    assert capsys.readouterr().out == "__main__ ['--lr', '0.1'] True\n"


def test_console_script() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    module, function = re.search(r'\[project\.scripts\]\nequivision-timm = "(\S+):(\S+)"', pyproject).groups()
    assert getattr(sys.modules[module], function) is main


# Without the extras

WITHOUT = """
import json, sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # importing it fails
from equivision_timm.cli.main import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[2])]))
"""
DRAWING = [
    ["demo", "--out", "demo.png"],
    ["rotate-eval", "--models", "test_c8resnet", "--data", "data", "--unlabelled", "--out", "out"],
    ["show", "data/a/image.png", "--model", "test_c8resnet", "--out", "show.png"],
]


def test_commands_without_matplotlib(folder: Path) -> None:
    """Those that draw say what to install, the others work; likewise for ONNX."""
    commands = [*DRAWING, ["export", "test_c8resnet", "model.onnx"], ["fetch", "c8resnet50"], ["list", "test_c8*"]]
    commands.append(["predict", "data", "--model", "test_c8resnet", "--device", "cpu"])
    before = sorted(folder.rglob("*"))
    path = {"PYTHONPATH": str(Path(equivision_timm.__file__).parents[1]), "EQUIVISION_TIMM_WEIGHTS": "none"}
    environment = {**os.environ, **path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", WITHOUT, "matplotlib skimage onnx gdown", json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 2, 2, 2, 2, 0, 0], done.stderr
    lines = [line for line in done.stderr.splitlines() if "pip install" in line]
    assert [line.partition(":")[0] for line in lines] == ["demo", "rotate-eval", "show", "export", "fetch"]
    assert all(install_command("tools") in line for line in lines[:3])
    assert install_command("export") in lines[3]
    assert install_command("fetch") in lines[4]
    assert sorted(folder.rglob("*")) == before
