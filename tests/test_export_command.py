"""`equivision-timm export`: an ONNX file that computes what the model does, or no file."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from PIL import Image
from support.small_models import save_training

import equivision_timm.cli.export as module
from equivision_timm.cli.main import main
from equivision_timm.cli.models import load
from equivision_timm.data import preparation
from equivision_timm.models import fuse

pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its exporter cannot write ViTs")
for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason="ONNX export needs the extra `export`")


def _run(file: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _metadata(file: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


@torch.no_grad()
def test_any_batch_and_metadata(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, classes = tmp_path / "new" / "model.onnx", tmp_path / "classes.txt"
    classes.write_text("\n".join(f"digit {i}" for i in range(10)))
    assert main(["export", "test_d4vit", str(file), "--class-map", str(classes)]) == 0
    model = timm.create_model("test_d4vit", pretrained=True).eval()
    for batch in (1, 5):
        images = torch.rand(batch, 3, 64, 64)
        torch.testing.assert_close(_run(file, images), model(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_run(file, images.rot90(dims=(2, 3))), model(images), rtol=1e-4, atol=1e-4)
    metadata = _metadata(file)
    assert metadata["classes"].splitlines()[3] == "digit 3"
    expected = {"model": "test_d4vit", "color": "RGB", "softmax": "no", "exact": "yes", "group": "d4"}
    assert {**expected, "mean": "0 0 0"}.items() <= metadata.items()
    captured = capsys.readouterr()
    assert f"{file}: " in captured.out
    assert "at 64 x 64 pixels they change by" in captured.out
    assert "is exact" not in captured.err


def test_metadata_are_enough_to_prepare_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A picture prepared by PIL and numpy from the strings gives the logits of timm's transform.

    `train.py --input-size 3 96 65`: both sides count for exactness, rotations are by 180 degrees.
    """
    picture = Image.radial_gradient("L").resize((150, 90)).convert("RGB")
    picture.putpixel((40, 30), (255, 0, 0))
    file, spec = tmp_path / "model.onnx", save_training(tmp_path, input_size=[3, 96, 65], crop_pct=0.8)
    assert main(["export", spec, str(file)]) == 0
    captured, text = capsys.readouterr(), _metadata(file)
    assert "rotated by 180 degrees at 96 x 65 pixels" in captured.out
    assert "is exact" in captured.err
    assert (text["exact"], text["model"]) == ("no", "c4resnet18_fast=model_best.pth.tar")
    assert str(tmp_path).encode() not in file.read_bytes()  # no folder of the user
    height, width = int(text["height"]), int(text["width"])
    scale = max(int(text["resize_height"]) / picture.height, int(text["resize_width"]) / picture.width)
    method, rule = text["resize"].split(" ", 1)
    assert rule.startswith("with antialiasing, aspect ratio kept")
    size = int(scale * picture.width), int(scale * picture.height)
    resized = picture.resize(size, Image.Resampling[method.upper()])
    top, left = round((resized.height - height) / 2), round((resized.width - width) / 2)
    pixels = np.asarray(resized)[top : top + height, left : left + width].astype(np.float32)  # [H, W, 3]
    mean, std = (np.array(text[key].split(), np.float32) for key in ("mean", "std"))
    images = ((pixels * np.float32(text["scale"]) - mean) / std).transpose(2, 0, 1)[None].copy()
    loaded = load(spec)
    expected = preparation(loaded.config)(picture)[None]
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_run(file, expected), loaded.model(expected).detach(), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    load(save_training(tmp_path, input_size=[3, 97, 65]))  # control
    assert "is exact" not in capsys.readouterr().err
    load(spec, 64)
    assert "--size 33 or 65 is exact" in capsys.readouterr().err


def test_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def damaged(model: nn.Module, form: str) -> nn.Module:
        other = copy.deepcopy(model)
        other.load_state_dict({key: 1.01 * v if key == "fc.weight" else v for key, v in model.state_dict().items()})
        return fuse(other, form)

    monkeypatch.setattr(module, "fuse", damaged)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"older")
    assert main(["export", "test_c1resnet", str(file)]) == 1
    assert "computes other logits than 'test_c1resnet'" in capsys.readouterr().err
    assert file.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
