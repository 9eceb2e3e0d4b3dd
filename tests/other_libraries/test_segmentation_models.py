"""segmentation_models.pytorch: encoders `tu-...`."""

import pytest

smp = pytest.importorskip("segmentation_models_pytorch", reason="extra `libraries`: segmentation-models-pytorch")


def test_encoder(moves, images):
    kwargs = {"in_channels": 3, "depth": 5, "weights": None}
    model = smp.encoders.get_encoder("tu-test_c8resnet", map_pool="max", **kwargs).eval()
    without = smp.encoders.get_encoder("tu-test_c8resnet", **kwargs).eval()
    assert [found.shape[1] for found in model(images)] == list(model.out_channels)
    for level in range(1, 6):
        assert moves(lambda x, level=level: model(x)[level]) < 1e-5
        assert moves(lambda x, level=level: without(x)[level]) > 1e-2  # control


def test_network(images):
    model = smp.Unet("tu-test_c8resnet", encoder_weights=None, classes=2, map_pool="max").eval()
    assert model(images[..., :64, :64]).shape == (2, 2, 64, 64)
