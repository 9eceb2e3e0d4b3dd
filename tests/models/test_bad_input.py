"""Mistakes of users: an error that quotes the value and says what to do, and nothing changed."""

import pytest
import timm
import torch
import torch.nn as nn

import equivision_timm  # noqa: F401  registers the models

MAPS = {"features_only": True}


def create(name="test_c8resnet", **kwargs):
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"group": "e4"}, "'e4'"),
        ({"group_pool": "mx"}, "'mx'"),
        ({"output_stride": 4}, "4"),
        ({"even": "blur"}, "'blur'"),
        ({"act_layer": nn.GLU}, "GLU"),
        ({"act_layer": "rellu"}, "'rellu'"),
        ({"global_pool": ""}, "global_pool"),
        ({"aa_layer": "avg"}, "'avg'"),
        ({"aa_layer": "sharp"}, "'sharp'"),
        ({"stem_type": "shallow"}, "'shallow'"),
        ({"stem_pool": "avg"}, "'avg'"),
        ({"block_args": {"attn_layer": "cbam"}}, "'cbam'"),
        ({"map_pool": "max", "num_classes": 10}, "map_pool"),
        ({"map_pool": "mean", "num_classes": 0}, "'mean'"),
        (MAPS | {"group_pool": "max"}, "map_pool"),
        (MAPS | {"map_pool": "max", "feature_cls": "list"}, "feature_cls"),
    ],
    ids=str,
)
def test_keyword_of_the_wrong_value(keywords, word):
    with pytest.raises(ValueError, match=word):
        create(**keywords)


def test_unknown_keyword_and_missing_weights():
    with pytest.raises(TypeError, match="grop_pool"):
        create(grop_pool="max")
    with pytest.raises(RuntimeError, match="c4resnet18_fast"):
        create("c4resnet18_fast", pretrained=True)


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(1, 1, 64, 64), "in_chans"),
        (torch.zeros(3, 64, 64), "3, 64, 64"),
    ],
)
def test_input_that_does_not_fit(x, word, features_only):
    with pytest.raises(AssertionError, match=word):
        create(features_only=features_only)(x)


@pytest.mark.parametrize(
    ("keywords", "error", "word"),
    [({"indices": [5]}, AssertionError, "5"), ({"output_fmt": "NHWC"}, ValueError, "NHWC")],
)
def test_intermediates_that_do_not_exist(keywords, error, word):
    with pytest.raises(error, match=word):
        create().forward_intermediates(torch.zeros(1, 3, 32, 32), **keywords)


@pytest.mark.parametrize(
    ("keywords", "arguments"), [({"num_classes": 7}, (5, "")), ({"num_classes": 0, "map_pool": "max"}, (10,))]
)
def test_a_classifier_on_a_map_is_refused_and_nothing_changed(keywords, arguments):
    model, x = create(**keywords).eval(), torch.rand(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(ValueError, match="num_classes=0"):
        model.reset_classifier(*arguments)
    assert model.num_classes == keywords["num_classes"]
    assert torch.equal(model(x), expected)
