"""Invariant maps for heads without a group, and cuts of a model by its children."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.models._hub import save_for_hf

import equivision_timm  # noqa: F401  registers the models

X = torch.rand(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))


def create(name="test_c8resnet", **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def moves(function):
    """How far the output moves, by its largest value, when the image turns by 90 degrees and the map with it."""
    with torch.no_grad():
        plain, rotated = function(X), function(X.rot90(1, (2, 3)))
    if plain.ndim == 4:
        rotated = rotated.rot90(-1, (2, 3))
    return ((plain - rotated).abs().max() / plain.abs().max()).item()


@pytest.mark.parametrize("map_pool", ["max", "avg"])
@pytest.mark.parametrize("name", ["test_c8resnet", "test_d4resnet"])
def test_maps_are_invariant_with_one_channel_a_field(name, map_pool):
    model, plain = create(name, num_classes=0, map_pool=map_pool), create(name, num_classes=0)
    order = plain.group_pool.order
    with torch.no_grad():
        fields = plain.forward_features(X).unflatten(1, (-1, order))  # [B, m, |G|, H, W]
        torch.testing.assert_close(
            model.forward_features(X), fields.amax(2) if map_pool == "max" else fields.mean(2), rtol=1e-5, atol=1e-6
        )
        last, maps = model.forward_intermediates(X)
        assert torch.equal(last, maps[-1])
    features = create(features_only=True, name=name, map_pool=map_pool, out_indices=(1, 3)).eval()
    with torch.no_grad():
        for found, level in zip(features(X), (1, 3), strict=True):
            torch.testing.assert_close(found, maps[level])
    assert features.feature_info.channels() == [maps[1].shape[1], maps[3].shape[1]]
    assert moves(lambda x: features(x)[0]) < 1e-5
    assert moves(model.forward_features) < 1e-5
    assert moves(plain.forward_features) > 0.1  # control: the channels of a field are permuted
    assert moves(lambda x: model.forward_head(model.forward_features(x))) < 1e-5
    maximum = create(name, num_classes=0, global_pool="")(X)  # the other way: the head's group pooling of the last map
    torch.testing.assert_close(maximum, fields.amax(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(create(name, num_classes=0, global_pool="", group_pool="")(X), fields.flatten(1, 2))
    assert plain(X).shape[1] != plain.num_features  # control: without the keyword the width is another
    assert model.num_features == model.head_hidden_size == last.shape[1] == plain.num_features // order
    for info, equivariant, found in zip(model.feature_info, plain.feature_info, maps, strict=True):
        assert info["num_chs"] == info["num_fields"] == equivariant["num_fields"] == found.shape[1]
        assert info["group"] == "c1"


def test_a_name_is_enough(tmp_path):
    # libraries that pass a name on and no keywords: a folder whose config holds the keyword
    model = create(num_classes=0, map_pool="max")
    save_for_hf(model, str(tmp_path), model_args={"map_pool": "max", "num_classes": 0}, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(X), model.forward_features(X))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert moves(lambda x: features(x)[-1]) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", "test_c8resnet"])
def test_cuts_by_children(name):
    # as countless scripts cut a ResNet; resnet18 is the control
    model = timm.create_model(name, num_classes=5).eval()
    children = list(model.children())
    with torch.no_grad():
        features = model.forward_features(X)
        torch.testing.assert_close(nn.Sequential(*children[:8])(X), features)
        torch.testing.assert_close(nn.Sequential(*children[:-2])(X), features)
        torch.testing.assert_close(nn.Sequential(*children[:-1])(X), model.forward_head(features, pre_logits=True))
        _, maps = model.forward_intermediates(X)
        for end, expected in zip((5, 6, 7, 8), maps[1:], strict=True):
            torch.testing.assert_close(nn.Sequential(*children[:end])(X), expected)
    assert children[-1] is model.fc
    assert children[-2] is model.global_pool
