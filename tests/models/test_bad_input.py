"""What users get wrong: an error that quotes the value and says what to do."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import apply_test_time_pool

import equivision_timm  # noqa: F401  (registers the models)


def create(**kwargs):
    return timm.create_model("c4resnet18_fast", **kwargs)


@pytest.mark.parametrize("name", ["c6resnet18", "c4resnet34", "e4resnet18"])
def test_unregistered_group_or_depth(name):
    with pytest.raises(RuntimeError, match=f"Unknown model.*{name}"):
        timm.create_model(name)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group": "e4"}, "unknown group 'e4': use 'cN'"),
        ({"group_pool": "mx"}, "unknown group_pool 'mx': use 'max', 'avg', or ''"),
        ({"output_stride": 4}, "output_stride 4 does not exist: use 8, 16 or 32"),
        ({"act_layer": nn.GLU}, "GLU.* is not pointwise.*use one that acts on every value by itself"),
        ({"act_layer": "rellu"}, "unknown act_layer 'rellu': use a name timm knows"),
        ({"global_pool": ""}, "global_pool '' keeps the map.*use num_classes=0, or global_pool='avg'"),
        ({"norm_layer": "layernorm2d", "bn_eps": 1e-3}, "bn_eps needs a batch norm.*leave it out"),
        ({"features_only": True, "out_indices": (1, 5)}, r"feature level 5 of out_indices=\(1, 5\).*use 0 to 4"),
        ({"features_only": True, "out_indices": (-6,)}, r"feature level -6 of out_indices=\(-6,\).*use 0 to 4"),
        ({"features_only": True, "out_indices": 6}, "feature level -6 of out_indices=6 .*use 0 to 4"),
    ],
)
def test_keyword_of_the_wrong_value(keywords, message):
    with pytest.raises(ValueError, match=message):
        create(**keywords)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="grop_pool"):
        create(grop_pool="max")


def test_no_weights_exist():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for c4resnet18_fast"):
        create(pretrained=True)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 31, 31), "height 31 is too small: use at least 32"),
        (torch.zeros(1, 1, 64, 64), "in_chans"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "expected floating-point images, got torch.uint8: convert"),
        (torch.zeros(3, 64, 64), "dimension"),
    ],
)
def test_input_that_does_not_fit(x, message, features_only):
    model = create(features_only=features_only).eval()
    with pytest.raises(AssertionError, match=message):
        model(x)


def test_intermediates_of_a_level_that_does_not_exist():
    with pytest.raises(AssertionError, match=r"feature index 5 is out of range \(0 to 4\)"):
        create().forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[5])


def test_channels_last_output_of_intermediates():
    with pytest.raises(ValueError, match="output_fmt 'NHWC' does not exist for this model: use 'NCHW'"):
        create().forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")


def test_a_classifier_on_a_map_is_refused_and_nothing_changed():
    model = create(num_classes=7)
    with pytest.raises(ValueError, match="keeps the map"):
        model.reset_classifier(5, "")
    assert model.num_classes == 7
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_test_time_pooling_cannot_work():
    # timm's `--test-pool` puts the classifier on the map before any pooling, where the group axis still is. timm
    # copies the weights before it calls anything of ours, so its message is all there is.
    model = create()
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        apply_test_time_pool(model, {"input_size": (3, 257, 257)})
