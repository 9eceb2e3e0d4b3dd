"""fastai: the network that its vision learner builds, with a head of its own."""

import pytest

learner = pytest.importorskip("fastai.vision.learner", reason="extra `libraries`: fastai")


def network(name, **kwargs):
    return learner.create_timm_model(name, 5, pretrained=kwargs.pop("pretrained", True), **kwargs)[0].eval()


def test_network_of_the_learner(moves, images):
    model = network("test_c8resnet", map_pool="max")
    assert model(images).shape == (2, 5)
    assert moves(model) < 1e-5
    assert moves(network("test_c8resnet")) > 1e-2  # control: the head reads permuted channels
    assert moves(network("resnet18", pretrained=False)) > 1e-3  # control
