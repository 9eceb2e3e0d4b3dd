"""timm's keywords for ResNets: equivariant, and the same in inference."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import DropBlock2d, get_act_layer
from timm.utils import reparameterize_model

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.layers import ConvNormAct
from equivision_timm.testing import assert_equivariant, equivariance_error

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


@pytest.mark.parametrize(
    ("name", "keywords"), list(zip(5 * ["test_c8resnet", "test_d4resnet"], KEYWORDS, strict=True)), ids=str
)
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
    model = timm.create_model("test_c8resnet", act_layer=act_layer).eval()
    assert_equivariant(model, 33)
    acts = [module.act for module in model.modules() if isinstance(module, ConvNormAct)]
    assert {type(act) for act in acts} == {get_act_layer(act_layer), nn.Identity}


@pytest.mark.parametrize(("act_layer", "overwrites"), [(nn.ReLU, True), (nn.SiLU, False)])
def test_only_relu_overwrites_its_input(act_layer, overwrites):
    """For the gradient of SiLU, PyTorch would copy what it overwrites."""
    block = timm.create_model("test_c8resnet", act_layer=act_layer).layer1[0]
    assert [block.conv1.act.inplace, block.conv2.act.inplace] == [overwrites, overwrites]


def test_positions_break_what_they_should():
    """The control: a pooling of 2 x 2 pixels, as timm averages, is seen by the measurement."""
    model = timm.create_model("test_c8resnet", num_classes=5)
    model.maxpool = torch.nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
    assert max(equivariance_error(model, 65)[g] for g in (2, 4, 6)) > 1e-3


def test_drop_block_drops_in_training_only():
    model = timm.create_model("test_c8resnet", drop_block_rate=0.5)
    blocks = [module for module in model.modules() if isinstance(module, DropBlock2d)]
    assert [block.block_size for block in blocks] == [5, 3]  # one block in each of the last two stages
    x = torch.rand(2, 3, 129, 129)
    first = model.train()(x)
    assert not torch.allclose(model(x), first)
    assert torch.equal(model.eval()(x), model(x))
