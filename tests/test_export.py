"""Deployment: one plain convolution for every steerable one, in PyTorch, TorchScript, torch.export, ONNX and compiled.

`fuse()` (timm's `reparameterize_model`, `--reparam` in its scripts) folds basis, coefficients and norm into
`nn.Conv2d`; exported graphs then hold convolutions and no bases.
"""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.models import reparameterize_model

from equivision_timm.layers import SteerableConv2d

GROUPS = ("c1", "d1", "c4", "d4", "c8", "d8")
FAST = [f"{group}resnet{depth}_fast" for group in GROUPS for depth in (18, 50)]
COMPILED = [("test_d4resnet", "inductor")]
for _name in FAST:
    _often = _name.startswith(("c1resnet18", "d4", "c8resnet18"))
    COMPILED.append(pytest.param(_name, "eager", marks=[] if _often else pytest.mark.slow))
CONVOLUTIONS = {18: 20, 50: 53}
SIZE = 64


def _model(name: str) -> nn.Module:
    """In eval mode, with norms that do something: statistics of random images, scales and shifts away from 1 and 0."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        model(torch.randn(4, 3, SIZE, SIZE))
    return model.eval()


def _images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def _assert_same(ours: torch.Tensor | np.ndarray, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    ours = torch.as_tensor(ours)
    assert expected.std() > 1e-2  # logits that could differ
    assert (ours - expected).abs().max().item() <= tolerance


def _depth(name: str) -> int:
    return 18 if "18" in name else 50


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAST, "c8resnet18", "d4resnet50"])
def test_fused_model_is_plain_and_the_same(name: str) -> None:
    model = _model(name)
    fused = reparameterize_model(model)
    _assert_same(fused(_images()), model(_images()))
    convolutions = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == CONVOLUTIONS[_depth(name)]
    assert all(type(module) is nn.Conv2d and module.bias is not None for module in convolutions)
    assert not any(isinstance(module, (SteerableConv2d, nn.BatchNorm2d)) for module in fused.modules())
    assert not list(fused.buffers())  # neither bases nor statistics
    assert any(isinstance(module, SteerableConv2d) for module in model.modules())  # the model itself stays


@torch.no_grad()
def test_comparison_notices_a_forgotten_norm() -> None:
    model = _model("c4resnet18_fast")
    expected = model(_images())
    fused = reparameterize_model(model)
    fused.conv1.conv.bias.zero_()
    with pytest.raises(AssertionError):
        _assert_same(fused(_images()), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
@pytest.mark.parametrize("name", FAST)
def test_torchscript(name: str, tmp_path: Path) -> None:
    model = _model(name)
    torch.jit.script(reparameterize_model(model)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    _assert_same(loaded(_images(3)), model(_images(3)))
    assert not list(loaded.buffers())
    if _depth(name) == 18:
        _assert_same(torch.jit.script(model)(_images(3)), model(_images(3)))  # unfused too


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
@pytest.mark.parametrize("name", FAST)
def test_torch_export_and_onnx(name: str, tmp_path: Path) -> None:
    """One exported program with a dynamic batch, and the ONNX file made from it, run by onnxruntime."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    import onnx
    import onnxruntime

    model = _model(name)
    expected = {batch: model(_images(batch)) for batch in (1, 3)}
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(reparameterize_model(model), (_images(),), dynamic_shapes=({0: batch},))
    _assert_same(program.module()(_images(3)), expected[3])
    operations = [str(node.target) for node in program.graph.nodes]
    assert sum("conv2d" in name for name in operations) == CONVOLUTIONS[_depth(name)]
    assert not any("matmul" in name for name in operations)  # no filter is expanded
    assert not program.graph_signature.buffers

    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
    graph = onnx.load(path).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == CONVOLUTIONS[_depth(name)]
    assert not any(node.op_type in ("MatMul", "Einsum", "BatchNormalization") for node in graph.node)
    assert not any("basis" in tensor.name for tensor in graph.initializer)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size, logits in expected.items():
        (ours,) = session.run(None, {session.get_inputs()[0].name: _images(size).numpy()})
        _assert_same(ours, logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inside
@torch.no_grad()
@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_torch_compile(name: str, backend: str) -> None:
    """Unfused, one graph; code is generated, which takes long, for the smallest model only."""
    torch.compiler.reset()
    model = _model(name)
    _assert_same(torch.compile(model, backend=backend, fullgraph=True)(_images()), model(_images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inside
@pytest.mark.parametrize("name", ["c4resnet18_fast", "d8resnet18_fast"])
def test_gradient_of_a_compiled_model(name: str) -> None:
    torch.compiler.reset()
    model = _model(name)
    gradients = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        run(_images()).square().mean().backward()
        gradients.append(model.conv1.conv.weight.grad.clone())
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
