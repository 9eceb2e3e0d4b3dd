"""open_clip: its image tower on a timm trunk, which it builds from a name alone."""

import pytest

timm_model = pytest.importorskip("open_clip.timm_model", reason="extra `libraries`: open_clip")


def tower(name):
    return timm_model.TimmModel(name, embed_dim=16, image_size=65, pool="avg", proj="linear", pretrained=True).eval()


def test_image_tower(moves, images, invariant_folder):
    model = tower(invariant_folder)
    assert model(images).shape == (2, 16)
    assert moves(model) < 1e-5
    assert moves(tower("test_c1resnet")) > 1e-2  # control: the plain twin


def test_control_without_map_pool(images):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # num_features counts equivariant channels
        tower("test_c8resnet")(images)
