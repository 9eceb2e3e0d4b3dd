"""OpenVINO, quantisation, pruning and counters: what they make of a model and of its fused forms."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

from equivision_timm import fuse

X = torch.zeros(1, 3, 65, 65)


def models():
    """A model, and plain convolutions that compute the same."""
    model = timm.create_model("test_c8resnet", pretrained=True).eval()
    return model, fuse(model, "dense")


def test_counters(library):
    """fvcore counts the dense convolutions, thop only those of the folded network."""
    fvcore, thop = library("fvcore.nn"), library("thop")
    model, folded = (fvcore.FlopCountAnalysis(model, X).total() for model in models())
    assert 1 <= model / folded < 1.2  # the norms and the products that expand filters come on top
    by_thop = [thop.profile(model, inputs=(X,), verbose=False)[0] for model in models()]
    assert by_thop[1] == pytest.approx(folded, rel=1e-3)
    assert by_thop[0] < 0.02 * folded


def test_torch_pruning_prunes_only_the_folded_network(library):
    tp, left = library("torch_pruning"), []
    plain, folded = models()
    for model in (plain, folded.requires_grad_(), timm.create_model("resnet18").eval()):  # resnet18: control
        before = sum(parameter.numel() for parameter in model.parameters())
        importance = tp.importance.MagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(model, X, importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
        left.append(sum(parameter.numel() for parameter in model.parameters()) / before)
        assert model(X).shape == (1, model.num_classes)
    assert left[0] == 1
    assert max(left[1:]) < 0.5


@pytest.mark.parametrize("convert", [lambda model: model, reparameterize_model, lambda model: fuse(model, "dense")])
def test_openvino(convert, library, images):
    """In float32, which has to be asked for where the processor knows bfloat16, and for a size that is known."""
    openvino, model = library("openvino"), models()[0]
    with torch.no_grad():
        expected = model(images)
    converted = openvino.convert_model(convert(model), example_input=images, input=list(images.shape))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(images.numpy())[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_pt2e_quantises_only_the_folded_network(library, images):
    steps = library("torchao.quantization.pt2e.quantize_pt2e")
    x86 = library("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    counts = []
    for model in models():
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = steps.prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
        prepared(images)
        nodes = [node for node in steps.convert_pt2e(prepared).graph.nodes if "conv2d" in str(node.target)]
        counts.append((len(nodes), sum("dequantize" in str(node.args[1].target) for node in nodes)))
    assert counts == [(12, 0), (12, 12)]  # its filters are computed, so there is none to quantise
