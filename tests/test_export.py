"""Deployment: `fuse(model, "dense")` gives plain convolutions; TorchScript, torch.export and ONNX take every form."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import reparameterize_model

from equivision_timm import fuse
from equivision_timm.layers import SteerableConv2d

FAST = [
    "c1resnet50_fast",
    "d1resnet18_fast",
    "c4resnet18_fast",
    "d4resnet50_fast",
    "c8resnet18_fast",
    "d8resnet18_fast",
]
CONVOLUTIONS = {"18": 20, "50": 53}


def make(name: str) -> nn.Module:
    """In eval mode, with statistics of random images, scales and shifts away from 1 and 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_same(found, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-2  # logits that could differ
    assert (torch.as_tensor(found) - expected).abs().max().item() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAST, "c8resnet18", "d4resnet50"])
def test_dense_model(name: str) -> None:
    model = make(name)
    plain = fuse(model, "dense")
    assert_same(plain(images()), model(images()))
    convolutions = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == CONVOLUTIONS["18" if "18" in name else "50"]
    assert all(type(module) is nn.Conv2d and module.bias is not None for module in convolutions)
    assert not any(isinstance(module, (SteerableConv2d, nn.BatchNorm2d)) for module in plain.modules())
    assert not list(plain.buffers())  # neither bases nor statistics
    assert any(isinstance(module, SteerableConv2d) for module in model.modules())  # the model itself is unchanged
    convolutions[0].bias.zero_()
    with pytest.raises(AssertionError):  # control: a forgotten norm
        assert_same(plain(images()), model(images()))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
@pytest.mark.parametrize("name", FAST)
def test_torchscript(name: str, tmp_path: Path) -> None:
    model = make(name)
    torch.jit.script(reparameterize_model(model)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_same(loaded(images(3)), model(images(3)))
    assert not list(loaded.buffers())
    assert_same(torch.jit.script(model)(images(3)), model(images(3)))  # unfused too


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
@pytest.mark.parametrize("name", FAST[1:4])
def test_torch_export_and_onnx(name: str, tmp_path: Path) -> None:
    """One exported program with a dynamic batch, and the ONNX file made from it, run by onnxruntime."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    import onnx
    import onnxruntime

    model = make(name)
    expected = {batch: model(images(batch)) for batch in (1, 3)}
    count = CONVOLUTIONS["18" if "18" in name else "50"]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fuse(model, "dense"), (images(),), dynamic_shapes=({0: batch},))
    assert_same(program.module()(images(3)), expected[3])
    operations = [str(node.target) for node in program.graph.nodes]
    assert sum("conv2d" in name for name in operations) == count
    assert not any("matmul" in name for name in operations)  # no filter is expanded
    assert not program.graph_signature.buffers

    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
    graph = onnx.load(path).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == count
    assert not any(node.op_type in ("MatMul", "Einsum", "BatchNormalization") for node in graph.node)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size, logits in expected.items():
        (found,) = session.run(None, {session.get_inputs()[0].name: images(size).numpy()})
        assert_same(found, logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inside
@pytest.mark.parametrize(
    ("name", "backend"), [("test_d4resnet", "inductor"), ("c1resnet18_fast", "eager"), ("d8resnet18_fast", "aot_eager")]
)
def test_torch_compile(name: str, backend: str) -> None:
    """Unfused, one graph: logits, and the gradient of the stem."""
    torch.compiler.reset()
    model = make(name)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(images()), model(images()))
    if backend == "aot_eager":
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            run(images()).square().mean().backward()
            gradients.append(model.conv1.conv.weight.grad.clone())
        assert gradients[1].abs().max() > 0
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
