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


def _auroc(normal: torch.Tensor, defective: torch.Tensor) -> float:
    """How often a defective piece scores above a normal one."""
    return (defective[:, None] > normal).double().mean().item()


def test_patchcore_does_not_care_how_a_part_lies(invariant_folder):
    """Trained on upright pieces of a wall; turned pieces without a defect score as they do upright."""
    data = pytest.importorskip("skimage.data", reason="photographs of scikit-image")
    wall = torch.from_numpy(data.brick().copy()).float() / 255
    pieces = torch.stack([wall[y : y + 65, x : x + 65] for y in range(0, 447, 55) for x in range(0, 447, 55)])
    pieces = pieces[:, None].expand(-1, 3, -1, -1)  # [81, 3, 65, 65]
    normal, good = pieces[:40], pieces[41:].contiguous()
    bad = good.clone()
    bad[:, :, 20:36, 25:41] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    separation, change = {}, {}
    for name in (invariant_folder, "test_c8resnet"):
        torch.manual_seed(0)
        model = patchcore.PatchcoreModel(backbone=name, layers=["layer2", "layer3"], pre_trained=True).train()
        model(normal)
        model.subsample_embedding(0.2)
        model.eval()
        with torch.no_grad():
            upright, turned, worst = (
                model(x.contiguous()).pred_score.flatten() for x in (good, good.rot90(1, (2, 3)), bad)
            )
        separation[name] = _auroc(upright, worst), _auroc(turned, worst)
        change[name] = ((turned - upright).abs().max() / upright.max()).item()
    assert change[invariant_folder] < 1e-4
    assert min(separation[invariant_folder]) > 0.95
    assert change["test_c8resnet"] > 0.1  # control
    assert separation["test_c8resnet"][1] < separation["test_c8resnet"][0] - 0.2
