"""How far results are from the expected ones, and what the ONNX file of a model computes."""

import pytest
import torch


def relative(found, expected):
    """The largest difference, relative to the largest expected number."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def onnx_function(folder, model, x, **options):
    """The ONNX file of `model`, exported with the image `x`, as a function of images."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        runtime = pytest.importorskip(module, reason="ONNX export needs the extra `export`")
    torch.onnx.export(model, (x,), folder / "model.onnx", verbose=False, **options)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
