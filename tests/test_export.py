"""Deployment: TorchScript, torch.export, ONNX and torch.compile take the model and its fused forms."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from support.small_models import stirred
from timm.models import reparameterize_model

from equivision_timm import SteerableConv2d, fuse


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return stirred(timm.create_model(name, num_classes=10))


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_same(found, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-2  # logits that could differ
    assert (torch.as_tensor(found) - expected).abs().max().item() <= 1e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
def test_torchscript(tmp_path: Path) -> None:
    model = make("test_c8resnet")
    torch.jit.script(reparameterize_model(model)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_same(loaded(images(3)), model(images(3)))
    assert not list(loaded.buffers())
    assert_same(torch.jit.script(model)(images(3)), model(images(3)))  # unfused too


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
def test_torch_export_and_onnx(tmp_path: Path) -> None:
    """One exported program with a dynamic batch, and the ONNX file made from it, run by onnxruntime."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    import onnx
    import onnxruntime

    model = make("test_c8resnet")
    convolutions = sum(isinstance(module, SteerableConv2d) for module in model.modules())
    expected = {batch: model(images(batch)) for batch in (1, 3)}
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fuse(model, "dense"), (images(),), dynamic_shapes=({0: batch},))
    assert_same(program.module()(images(3)), expected[3])
    operations = [str(node.target) for node in program.graph.nodes]
    assert sum("conv2d" in name for name in operations) == convolutions
    assert not any("matmul" in name for name in operations)  # no filter is expanded
    assert not program.graph_signature.buffers

    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
    graph = onnx.load(path).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == convolutions
    assert not any(node.op_type in ("MatMul", "Einsum", "BatchNormalization") for node in graph.node)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size, logits in expected.items():
        (found,) = session.run(None, {session.get_inputs()[0].name: images(size).numpy()})
        assert_same(found, logits)
