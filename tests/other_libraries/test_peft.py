"""PEFT: low-rank adapters, which must change coefficients and never the pixels of filters."""

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from equivision_timm.layers import SteerableConv2d

peft = pytest.importorskip("peft", reason="extra `libraries`: peft")


def trained(model, images):
    """After some steps in training mode of what can be trained, in eval mode."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1])).backward()
        optimizer.step()
    return model.eval()


def test_lora_on_the_classifier(moves, images):
    model = timm.create_model("test_c8resnet", pretrained=True)
    with torch.no_grad():
        before = model.eval()(images)
    model = trained(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"])), images)
    assert moves(model) < 1e-5
    with torch.no_grad():
        assert not torch.allclose(model(images), before, atol=1e-2)


def test_lora_knows_no_steerable_convolution():
    model = timm.create_model("test_c8resnet")
    with pytest.raises(ValueError, match="SteerableConv2d"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer1.0.conv1.conv"]))


class LowRank(nn.Module):
    """What the README shows: coefficients plus a product of two thin matrices."""

    def __init__(self, weight, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight[0].numel()) / rank)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def test_low_rank_coefficients(moves, images):
    model = timm.create_model("test_c8resnet", pretrained=True).requires_grad_(False).eval()
    with torch.no_grad():
        before = model(images)
    for layer in list(model.modules()):
        if isinstance(layer, SteerableConv2d):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank=2))
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)  # starts where it was
    trained(model, images)
    with torch.no_grad():
        adapted = model(images)
        assert not torch.allclose(adapted, before, atol=1e-2)
    assert moves(model) < 1e-5
    for layer in list(model.modules()):
        if isinstance(layer, SteerableConv2d):
            parametrize.remove_parametrizations(layer, "weight")  # merged
    with torch.no_grad():
        torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
