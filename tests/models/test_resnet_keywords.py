"""timm's keywords for ResNets: equivariant, and the same in inference; mistakes give an error with the value."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import DropBlock2d, get_act_layer
from timm.utils import reparameterize_model

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.layers import ConvNormAct
from equivision_timm.testing import assert_equivariant, equivariance_error

NAME = "test_c8resnet"
KEYWORDS = [
    {"aa_layer": "blur"},
    {"aa_layer": "blur5", "avg_down": True},
    {"stem_type": "deep", "avg_down": True},
    {"stem_type": "deep_tiered", "replace_stem_pool": True},
    {"replace_stem_pool": True, "aa_layer": "blurpc"},
    {"stem_pool": "blur"},
    {"low_pass": True, "stem_pool": "blur", "avg_down": True, "act_layer": "silu"},
    {"block_args": {"attn_layer": "se"}},
    {"block_args": {"attn_layer": "eca"}},
    {"drop_block_rate": 0.1},
]


@pytest.mark.parametrize(("name", "keywords"), list(zip(5 * [NAME, "test_d4resnet"], KEYWORDS, strict=True)), ids=str)
def test_keywords(name, keywords):
    model = timm.create_model(name, num_classes=5, **keywords)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 65, 65))  # batch norms that are not the identity
    assert_equivariant(model.eval(), 65)
    x = torch.rand(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-5)
    for size, expected in ((65, 3), (64, 2)):
        assert model.forward_features(torch.rand(1, 3, size, size)).shape[-2:] == (expected, expected)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("act_layer", [nn.Softplus, nn.SiLU, "tanh"])
def test_activations_with_and_without_inplace(act_layer):
    """Only ReLU overwrites its input: for the gradient of SiLU, PyTorch would copy what it overwrites."""
    model = timm.create_model(NAME, act_layer=act_layer).eval()
    assert_equivariant(model, 33)
    acts = [module.act for module in model.modules() if isinstance(module, ConvNormAct)]
    assert {type(act) for act in acts} == {get_act_layer(act_layer), nn.Identity}
    assert not any(getattr(act, "inplace", False) for act in acts)
    assert timm.create_model(NAME).layer1[0].conv1.act.inplace


def test_positions_break_what_they_should():
    """The control: a pooling of 2 x 2 pixels, as timm averages, is seen by the measurement."""
    model = timm.create_model(NAME, num_classes=5)
    model.maxpool = torch.nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
    assert max(equivariance_error(model, 65)[g] for g in (2, 4, 6)) > 1e-3


def test_drop_block_drops_in_training_only():
    model = timm.create_model(NAME, drop_block_rate=0.5)
    blocks = [module for module in model.modules() if isinstance(module, DropBlock2d)]
    assert [block.block_size for block in blocks] == [5, 3]  # one block in each of the last two stages
    x = torch.rand(2, 3, 129, 129)
    first = model.train()(x)
    assert not torch.allclose(model(x), first)
    assert torch.equal(model.eval()(x), model(x))


WRONG = [
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
    ({"features_only": True, "group_pool": "max"}, "map_pool"),
    ({"features_only": True, "map_pool": "max", "feature_cls": "list"}, "feature_cls"),
]


def test_keyword_of_the_wrong_value():
    for keywords, word in WRONG:
        with pytest.raises(ValueError, match=word):
            timm.create_model(NAME, **keywords)
    with pytest.raises(TypeError, match="grop_pool"):
        timm.create_model(NAME, grop_pool="max")
    with pytest.raises(ValueError, match="NHWC"):
        timm.create_model(NAME).forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")


@pytest.mark.parametrize("features_only", [False, True])
def test_input_that_does_not_fit(features_only):
    model = timm.create_model(NAME, features_only=features_only)
    for x, word in ((torch.zeros(1, 1, 64, 64), "in_chans"), (torch.zeros(3, 64, 64), "3, 64, 64")):
        with pytest.raises(AssertionError, match=word):
            model(x)


@pytest.mark.parametrize(
    ("keywords", "arguments"), [({"num_classes": 7}, (5, "")), ({"num_classes": 0, "map_pool": "max"}, (10,))]
)
def test_a_classifier_on_a_map_is_refused_and_nothing_changed(keywords, arguments):
    model, x = timm.create_model(NAME, **keywords).eval(), torch.rand(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(ValueError, match="num_classes=0"):
        model.reset_classifier(*arguments)
    assert model.num_classes == keywords["num_classes"]
    assert torch.equal(model(x), expected)
