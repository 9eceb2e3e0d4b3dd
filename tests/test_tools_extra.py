"""Without matplotlib everything works but the commands that draw, which say at once what to install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.reference_data import checkpoint

SCRIPT = """
import json, sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # importing it fails
from equivision_timm.cli.main import main
statuses = []
for arguments in json.loads(sys.argv[2]):
    statuses.append(main(arguments))
    sys.stdout.flush()
    print("|", file=sys.stderr)
print(json.dumps(statuses))
"""


def run(missing: str, *commands: list[str], cwd: Path) -> tuple[list[int], list[str]]:
    """The exit statuses of commands, and what each says on stderr, where the modules `missing` cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, missing, json.dumps(commands)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), [said.strip() for said in done.stderr.split("|\n")[:-1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.radial_gradient("L").resize((40, 40)).save(tmp_path / "data" / name / "image.png")
    return tmp_path


DRAWING = (
    ["demo", "--out", "demo.png"],
    ["rotate-eval", "--models", "test_c8resnet", "--data", "data", "--unlabelled", "--out", "out"],
    ["show", "data/a/image.png", "--model", "test_c8resnet", "--out", "show.png"],
)


def test_what_does_not_draw_works_without_matplotlib(folder: Path) -> None:
    torch.save(checkpoint("c4resnet18"), folder / "c4.ckpt")
    statuses, said = run(
        "matplotlib skimage",
        ["list", "test_c8*"],
        ["predict", "data", "--model", "test_c8resnet", "--out", "classes.csv"],
        ["convert", "c4.ckpt", "--model", "c4resnet18", "--out", "model"],
        cwd=folder,
    )
    assert statuses == [0, 0, 0], said
    assert len((folder / "classes.csv").read_text().splitlines()) == 1 + 2 * 5
    assert (folder / "model" / "model.safetensors").is_file()


def test_what_draws_says_what_to_install(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    statuses, said = run("matplotlib", *DRAWING, cwd=folder)
    assert statuses == [2, 2, 2]
    for (name, *_), line in zip(DRAWING, said, strict=True):
        assert line.startswith(f"{name}: ")
        assert line.endswith("pip install 'equivision-timm[tools]'")
        assert "\n" not in line
    assert sorted(folder.rglob("*")) == before


def test_with_matplotlib_they_draw(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    statuses, said = run("skimage", *DRAWING[2:], cwd=folder)
    assert statuses == [0], said
    assert (folder / "show.png").is_file()
