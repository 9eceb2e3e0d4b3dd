"""scripts/deployment.py on a small network: forms that compute the same, and a table of what was measured."""

import importlib.util
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
