"""The commands take adapted models by name, with --model-kwargs."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from equivision_timm.cli.list_models import list_models
from equivision_timm.cli.main import main
from equivision_timm.cli.models import load


@pytest.fixture(params=["d4"])
def spec(request, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("symmetrized", backbone="test_resnet", group=request.param, num_classes=3).eval()
    model.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=1.0)
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'model'}"


@pytest.mark.parametrize("spec", ["c8"], indirect=True)
def test_predictions_do_not_depend_on_the_pose(spec, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    files = [str(tmp_path / "images" / "any" / f"{k}.png") for k in range(4)]
    (tmp_path / "images" / "any").mkdir(parents=True)
    for k, file in enumerate(files):
        Image.fromarray(np.rot90(pixels, k)).save(file)
    assert main(["predict", *files, "--model", spec]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.reader(out.splitlines()))[1:]
    assert len(rows) == 4 * 3
    assert len({tuple(row[1:]) for row in rows}) == 3  # the same for each pose
    assert main(["show", files[0], "--model", spec, "--out", str(tmp_path / "picture.png")]) == 0
    options = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "report"), "--unlabelled"]
    assert main(["rotate-eval", "--model", spec, "--angles", "0,90", "-j", "0", *options]) == 0
    assert "exact" not in err + capsys.readouterr().err  # quarter turns are, at every size


@pytest.mark.parametrize("spec", ["c2"], indirect=True)  # two views
def test_export(spec, tmp_path):
    assert main(["export", spec, str(tmp_path / "model.onnx")]) == 0
    assert (tmp_path / "model.onnx").is_file()


def test_verify(spec, tmp_path, capsys):
    folder = spec.removeprefix("local-dir:")
    assert main(["verify", folder]) == 0
    assert "rotations by 90 degrees and reflections in" in capsys.readouterr().out
    file = f"{folder}/model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "backbone.fc.bias"}, file)
    assert main(["verify", folder]) == 1
    assert "fc.bias" in capsys.readouterr().out


def test_list():
    sizes = {row.name: row.exact_sizes for row in list_models("c4*_vit_small_patch14_dinov2", 300)}
    assert set(sizes.values()) == {(518, 518)}  # the only size that it takes
    assert list_models("d4sym_resnet18", 300)[0].exact_sizes == (300, 300)


def test_keywords_reach_the_model(spec):
    assert load(spec).model.group_pool == "avg"
    assert load(spec, model_kwargs={"group_pool": "prob"}).model.group_pool == "prob"
