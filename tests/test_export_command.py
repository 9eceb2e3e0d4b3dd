"""`equivision-timm export`: an ONNX file that computes what the model does, or no file."""

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

pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its exporter cannot write ViTs")
for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason="ONNX export needs the extra `export`")


def _run(file: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _images(batch: int, size: int) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_c8resnet", "test_d4vit"])
def test_any_batch_and_metadata(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import onnx

    file = tmp_path / "new" / "model.onnx"
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(f"digit {i}" for i in range(10)))
    assert main(["export", name, str(file), "--class-map", str(classes)]) == 0
    model = timm.create_model(name, pretrained=True).eval()
    size = model.pretrained_cfg["input_size"][-1]
    for batch in (1, 5):
        torch.testing.assert_close(_run(file, _images(batch, size)), model(_images(batch, size)), rtol=1e-4, atol=1e-4)
    rotated = _run(file, _images(5, size).rot90(dims=(2, 3)))
    torch.testing.assert_close(rotated, _run(file, _images(5, size)), rtol=1e-4, atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert metadata["model"] == name
    assert metadata["classes"].splitlines()[3] == "digit 3"
    expected = {"color": "RGB", "softmax": "no", "exact": "yes", "group": name[5:7], "mean": "0 0 0"}
    assert expected.items() <= metadata.items()
    captured = capsys.readouterr()
    assert f"{file}: " in captured.out
    assert f"at {size} x {size} pixels they change by" in captured.out
    assert "is exact" not in captured.err


def test_metadata_are_enough_to_prepare_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A picture prepared by PIL and numpy from the strings gives the logits of timm's transform.

    After `train.py --input-size 3 96 65`: both sides count for exactness, rotations are by 180 degrees.
    """
    import onnx

    picture = Image.radial_gradient("L").resize((150, 90)).convert("RGB")
    picture.putpixel((40, 30), (255, 0, 0))
    file, spec = tmp_path / "model.onnx", save_training(tmp_path, input_size=[3, 96, 65], crop_pct=0.8)
    assert main(["export", spec, str(file)]) == 0
    captured = capsys.readouterr()
    assert "rotated by 180 degrees at 96 x 65 pixels" in captured.out
    assert "is exact" in captured.err
    text = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
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
    assert (height, width, text["exact"]) == (96, 65, "no")
    assert text["model"] == "c4resnet18_fast=model_best.pth.tar"
    assert str(tmp_path).encode() not in file.read_bytes()  # no folder of the user
    load(save_training(tmp_path, input_size=[3, 97, 65]))  # control
    assert "is exact" not in capsys.readouterr().err
    load(spec, 64)
    assert "--size 33 or 65 is exact" in capsys.readouterr().err


def test_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def damaged(model: nn.Module, form: str) -> nn.Module:
        fused = original(model, form)
        with torch.no_grad():
            fused.fc.weight.mul_(1.01)
        return fused

    original = module.fuse
    monkeypatch.setattr(module, "fuse", damaged)
    file, spec = tmp_path / "new" / "model.onnx", save_training(tmp_path, img_size=33)
    file.parent.mkdir()
    file.write_bytes(b"older")
    assert main(["export", spec, str(file)]) == 1
    assert "other logits" in capsys.readouterr().err
    assert file.read_bytes() == b"older"
    assert list(file.parent.iterdir()) == [file]
