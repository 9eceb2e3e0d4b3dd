"""Feature extraction: `features_only` with each of timm's wrappers, intermediates, pruning and heads."""

import pytest
import timm
import torch
import torch.nn as nn
from support.reference_data import image

import equivision_timm  # noqa: F401  (registers the models)


def seeded(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(
    ("feature_cls", "out_indices"),
    [*((kind, (1, -1)) for kind in ("list", "dict", "hook", "fx", "getter")), ("list", (0, 1, 2, 3, 4)), ("fx", 2)],
)
def test_every_wrapper_gives_the_intermediates(feature_cls, out_indices):
    x = image((1, 3, 65, 65))
    model = seeded("d4resnet18_fast", features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    levels = [-2, -1] if out_indices == 2 else list(out_indices)
    with torch.no_grad():
        expected = seeded("d4resnet18_fast").forward_intermediates(x, levels, intermediates_only=True)
        found = model(x)
    found = list(found.values()) if isinstance(found, dict) else found
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(
    ("group_pool", "global_pool"),
    [("max", "avg"), ("avg", "max"), ("", "avgmax"), ("max", "catavgmax"), ("", "catavgmax")],
)
def test_heads(group_pool, global_pool):
    model = seeded("c4resnet18_fast", num_classes=7, group_pool=group_pool, global_pool=global_pool)
    factor = 2 if global_pool == "catavgmax" else 1
    x, width = image((2, 3, 33, 33)), factor * (512 if group_pool == "" else 128)
    features = model.forward_features(x)
    if (group_pool, global_pool) == ("max", "avg"):  # over space before the group
        expected = features.mean((2, 3)).unflatten(1, (128, 4)).amax(2)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        other_order = features.unflatten(1, (128, 4)).amax(2).mean((2, 3))
        assert not torch.allclose(other_order, expected, rtol=1e-3)
    assert model.head_hidden_size == model.get_classifier().in_features == width
    assert model.forward_head(features, pre_logits=True).shape == (2, width)
    assert model(x).shape == (2, 7)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 512 if group_pool == "" else 128, 2, 2)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "output_stride", "side"),
    [("d4resnet18_fast", 32, 3), ("d4resnet18_fast", 8, 9), ("c8resnet50_fast", 16, 5)],
)
def test_levels_with_their_fields(name, output_stride, side):
    model = seeded(name, output_stride=output_stride, features_only=True)
    maps, info = model(image((1, 3, 65, 65))), model.feature_info
    assert maps[-1].shape[2:] == (side, side)
    assert info.reduction() == [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    assert [m.shape[1] for m in maps] == info.channels() == [8 * fields for fields in info.get("num_fields")]
    assert info.get("group") == 5 * [name[:2]]
    assert info.get("num_fields")[0] == 8


def test_drop_path_and_dropout_act_in_training():
    model, x = seeded("c4resnet18_fast", drop_path_rate=0.7, drop_rate=0.5), image((2, 3, 33, 33))
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == pytest.approx([0.1 * i for i in range(1, 8)])
    torch.testing.assert_close(model(x), model(x))
    features = model.forward_features(x)
    expected = model.forward_head(features, pre_logits=True)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert (dropped == 0).any()
    torch.testing.assert_close(dropped[dropped > 0], 2 * expected[dropped > 0])
    assert not torch.allclose(model.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize("name", ["d4resnet18_fast", "c8resnet50_fast"])  # both kinds of block
def test_zero_init_last_makes_every_block_a_shortcut(name):
    model = seeded(name, zero_init_last=True)
    block, x = model.layer1[1], torch.rand(1, model.layer1[1].conv1.conv.weight.shape[1] * 8, 5, 5)
    torch.testing.assert_close(block(x), x)
    model.init_weights()
    assert not torch.allclose(block(x), x)


def test_norm_options_and_order_of_parameters():
    model = seeded("c4resnet18_fast", bn_momentum=0.2, bn_eps=1e-3)
    assert [name for name, _ in model.named_parameters()][-2:] == ["fc.weight", "fc.bias"]  # not clipped by timm
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all((norm.momentum, norm.eps) == (0.2, 1e-3) for norm in norms)
