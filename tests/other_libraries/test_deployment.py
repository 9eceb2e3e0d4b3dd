"""OpenVINO and PT2E quantisation: what they make of a model and of its fused forms."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

from equivision_timm import fuse


def model(fold):
    plain = timm.create_model("test_c8resnet", pretrained=True).eval()
    return fuse(plain, "dense") if fold else plain


@pytest.mark.parametrize("convert", [lambda model: model, reparameterize_model, lambda model: fuse(model, "dense")])
def test_openvino(images, convert):
    """In float32, which has to be asked for where the processor knows bfloat16, and for a size that is known."""
    openvino = pytest.importorskip("openvino", reason="extra `libraries`: openvino")
    with torch.no_grad():
        expected = model(False)(images)
    converted = openvino.convert_model(convert(model(False)), example_input=images, input=list(images.shape))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(images.numpy())[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_pt2e_quantises_only_the_folded_network(images):
    steps = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="extra `libraries`: torchao")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    counts = {}
    for fold in (False, True):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = steps.prepare_pt2e(torch.export.export(model(fold), (images,)).module(), quantizer)
        prepared(images)
        nodes = [node for node in steps.convert_pt2e(prepared).graph.nodes if "conv2d" in str(node.target)]
        counts[fold] = len(nodes), sum("dequantize" in str(node.args[1].target) for node in nodes)
    assert counts == {False: (12, 0), True: (12, 12)}  # its filters are computed, so there is none to quantise
