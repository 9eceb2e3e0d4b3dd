"""transformers: TimmBackbone."""

import pytest

transformers = pytest.importorskip("transformers", reason="extra `libraries`: transformers")


def backbone(name, **kwargs):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=(2, 4), use_pretrained_backbone=False)
    return transformers.TimmBackbone(config, **kwargs).eval()


def test_backbone(moves, images, invariant_folder):
    for model in (backbone("test_c8resnet", map_pool="max"), backbone(invariant_folder)):
        assert [found.shape[1] for found in model(images).feature_maps] == list(model.channels)
        for level in range(2):
            assert moves(lambda x, level=level, model=model: model(x).feature_maps[level]) < 1e-5
    without = backbone("test_c8resnet")
    assert moves(lambda x: without(x).feature_maps[1]) > 1e-2  # control
