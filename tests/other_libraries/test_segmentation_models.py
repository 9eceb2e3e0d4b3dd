"""segmentation_models.pytorch: encoders `tu-...`."""

import pytest
import torch

from equivision_timm.models import Canonicalized

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


@pytest.mark.parametrize("choice", ["hard", "soft"])
def test_a_whole_network_canonicalized(choice, images):
    """A plain Unet as a module: its masks move with the image; in training every trained parameter has a gradient."""
    torch.manual_seed(0)
    unet = smp.Unet("tu-test_resnet", encoder_weights=None, classes=2).eval()
    x = images[..., :64, :64]
    model = Canonicalized(unet, "c4", choice=choice).eval()
    with torch.no_grad():
        masks = model(x)
        assert masks.shape == (2, 2, 64, 64)
        for k in range(4):
            turned = x.rot90(k, (-2, -1))
            torch.testing.assert_close(model(turned), masks.rot90(k, (-2, -1)), rtol=1e-3, atol=1e-4)
        assert (unet(x.rot90(1, (-2, -1))) - unet(x).rot90(1, (-2, -1))).abs().max() > 1e-2  # control
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
