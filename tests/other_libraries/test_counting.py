"""fvcore, thop and torch-pruning: what they see of a steerable convolution, and of the folded network."""

import pytest
import timm
import torch

X = torch.zeros(1, 3, 65, 65)


def models():
    model = timm.create_model("test_c8resnet").eval()
    return model, timm.utils.reparameterize_model(model)


def test_fvcore_counts_the_dense_convolutions():
    fvcore = pytest.importorskip("fvcore.nn", reason="extra `libraries`: fvcore")
    model, folded = (fvcore.FlopCountAnalysis(model, X).total() for model in models())
    assert 1 <= model / folded < 1.2  # the norms and the products that expand filters come on top


def test_thop_counts_only_the_folded_network():
    thop = pytest.importorskip("thop", reason="extra `libraries`: thop")
    fvcore = pytest.importorskip("fvcore.nn", reason="extra `libraries`: fvcore")
    model, folded = models()
    assert thop.profile(folded, inputs=(X,), verbose=False)[0] == pytest.approx(
        fvcore.FlopCountAnalysis(folded, X).total(), rel=1e-3
    )
    assert thop.profile(model, inputs=(X,), verbose=False)[0] < 0.02 * fvcore.FlopCountAnalysis(folded, X).total()


def test_torch_pruning_prunes_only_the_folded_network():
    tp = pytest.importorskip("torch_pruning", reason="extra `libraries`: torch-pruning")
    left = []
    for model in (*models(), timm.create_model("resnet18").eval()):  # resnet18: control
        before = sum(parameter.numel() for parameter in model.parameters())
        importance = tp.importance.MagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(model, X, importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
        left.append(sum(parameter.numel() for parameter in model.parameters()) / before)
        assert model(X).shape == (1, model.num_classes)
    assert left[0] == 1
    assert max(left[1:]) < 0.5
