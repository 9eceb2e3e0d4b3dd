"""scripts/deployment.py on a small network: forms that compute the same, and a table of what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

SCRIPT = Path(__file__).parents[1] / "scripts" / "deployment.py"
pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter lacks operators")


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX export needs the extra `export`")
    monkeypatch.syspath_prepend(SCRIPT.parent)  # the processes that measure import it by its name
    spec = importlib.util.spec_from_file_location("deployment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["deployment"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["deployment"]


@torch.no_grad()
def test_forms_compute_the_same(deployment, tmp_path: Path) -> None:
    name = "c8resnet18_fast"
    (expected, image), logits = deployment.build(name, "PyTorch: eager"), []
    for form in ("PyTorch: dense", "PyTorch: blocks"):
        model, _ = deployment.build(name, form)
        logits.append(model(image))
    sizes = []
    for form in ("onnxruntime: dense", "onnxruntime: blocks"):
        sizes.append(deployment.write_onnx(name, form, str(tmp_path)))
        (ours,) = deployment.prepare(name, form, str(tmp_path), 1)()
        logits.append(torch.from_numpy(ours))
    for ours in logits:
        torch.testing.assert_close(ours, expected(image), rtol=1e-4, atol=1e-4)
    assert sizes[1] < 0.5 * sizes[0]
    assert not [form for form in deployment.forms_of("resnet18") if "blocks" in form]


@pytest.mark.slow
def test_writes_what_it_measured(deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("openvino", reason="scripts/deployment.py also measures OpenVINO, of the extra `libraries`")
    monkeypatch.setattr(sys, "argv", ["", "test_c8resnet", "--threads", "1", "--repeats", "1", "--out", str(tmp_path)])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "")
    deployment.main()
    (row,) = json.loads((tmp_path / "deployment.json").read_text())["results"]
    assert set(row["ratio"]) == set(deployment.FORMS)
    assert all(0 < ratio < 10 for ratio in row["ratio"].values())  # a tiny network against a ResNet-18
    assert f"| {row['ratio']['OpenVINO: blocks']:.2f} |" in (tmp_path / "deployment.md").read_text()
    assert "test_c8resnet" in capsys.readouterr().out
