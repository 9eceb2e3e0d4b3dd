"""anomalib: features for PatchCore and PaDiM, from a backbone known by its name alone."""

import pytest
import torch

patchcore = pytest.importorskip("anomalib.models.image.patchcore.torch_model", reason="extra `libraries`: anomalib")
padim = pytest.importorskip("anomalib.models.image.padim.torch_model", reason="extra `libraries`: anomalib")


def test_patchcore(moves, images, invariant_folder):
    model = patchcore.PatchcoreModel(backbone=invariant_folder, layers=["layer2", "layer3"], pre_trained=True).eval()
    without = patchcore.PatchcoreModel(backbone="test_c8resnet", layers=["layer2", "layer3"], pre_trained=True).eval()
    for level in ("layer2", "layer3"):
        assert moves(lambda x, level=level: model.feature_extractor(x)[level]) < 1e-5
        assert moves(lambda x, level=level: without.feature_extractor(x)[level]) > 1e-2  # control


def test_padim(moves, invariant_folder):
    torch.manual_seed(0)
    model = padim.PadimModel(
        backbone=invariant_folder, layers=["layer1", "layer2"], pre_trained=True, n_features=8
    ).eval()
    for level in ("layer1", "layer2"):
        assert moves(lambda x, level=level: model.feature_extractor(x)[level]) < 1e-5
