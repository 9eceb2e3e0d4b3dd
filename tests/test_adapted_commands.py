"""The commands take adapted models by name, with --model-kwargs."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from equivision_timm.cli.main import main
from equivision_timm.cli.models import load


@pytest.fixture
def spec(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("symmetrized", backbone="test_resnet", group="d4", num_classes=3).eval()
    model.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=1.0)
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'model'}"


def test_predict_does_not_depend_on_the_pose(spec, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for k in range(4):
        Image.fromarray(np.rot90(pixels, k)).save(tmp_path / f"{k}.png")
    assert main(["predict", *(str(tmp_path / f"{k}.png") for k in range(4)), "--model", spec]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))[1:]
    assert len(rows) == 4 * 3
    assert len({tuple(row[1:]) for row in rows}) == 3


def test_export(spec, tmp_path):
    assert main(["export", spec, str(tmp_path / "model.onnx")]) == 0
    assert (tmp_path / "model.onnx").is_file()


def test_verify(spec, tmp_path, capsys):
    folder = spec.removeprefix("local-dir:")
    assert main(["verify", folder]) == 0
    assert "rotations by 90 degrees and reflections in d4" in capsys.readouterr().out
    file = f"{folder}/model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "backbone.fc.bias"}, file)
    assert main(["verify", folder]) == 1
    assert "fc.bias" in capsys.readouterr().out


def test_keywords_reach_the_model(spec):
    assert load(spec).model.group_pool == "avg"
    assert load(spec, model_kwargs={"group_pool": "prob"}).model.group_pool == "prob"
