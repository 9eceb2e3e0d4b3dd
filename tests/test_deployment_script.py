"""scripts/deployment.py on a small network: its forms compute the same."""

from pathlib import Path

import deployment
import pytest
import torch
from packaging.version import Version

pytestmark = pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter lacks operators")


@torch.no_grad()
def test_forms_compute_the_same(tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX export needs the extra `export`")
    name = "test_d4resnet"
    model, image = deployment.build(name, "PyTorch: eager")
    outputs = [deployment.build(name, form)[0](image) for form in ("PyTorch: dense", "PyTorch: blocks")]
    sizes = []
    for form in ("onnxruntime: dense", "onnxruntime: blocks"):
        sizes.append(deployment.write_onnx(name, form, str(tmp_path)))
        outputs.append(torch.from_numpy(deployment.prepare(name, form, str(tmp_path), 1)()[0]))
    for output in outputs:
        torch.testing.assert_close(output, model(image), rtol=1e-4, atol=1e-4)
    assert sizes[1] < 0.5 * sizes[0]
    assert not [form for form in deployment.forms_of("resnet18") if "blocks" in form]
