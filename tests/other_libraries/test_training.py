"""accelerate, Opacus and PEFT: weights that come late, gradients of single samples, low-rank adapters."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from equivision_timm.layers import SteerableConv2d


def test_accelerate(library, images, tmp_path):
    """Built empty; offloaded; its children on the processor and on disk by turns."""
    accelerate = library("accelerate")
    model = timm.create_model("test_c8resnet").eval()
    with torch.no_grad():
        expected = model(images)
    with accelerate.init_empty_weights(include_buffers=True):
        empty = timm.create_model("test_c8resnet").eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    places = {child: ("cpu", "disk")[i % 2] for i, (child, _) in enumerate(model.named_children())}
    offloaded, dispatched = copy.deepcopy(model), copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    accelerate.dispatch_model(dispatched, places, main_device="cpu", offload_dir=tmp_path)
    with torch.no_grad():
        assert torch.equal(empty(images), expected)
        for model in (offloaded, dispatched):
            assert any(parameter.is_meta for parameter in model.parameters())
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_opacus(library):
    """Gradients of single samples; ResNets, as timm's, add their shortcut in place, which its hooks forbid."""
    opacus = library("opacus")
    model = timm.create_model("test_d4vit", num_classes=3)
    images, labels = torch.rand(2, *model.pretrained_cfg["input_size"]), torch.tensor([0, 2])
    alone = copy.deepcopy(model)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
    for index in range(2):
        loss = F.cross_entropy(alone(images[index : index + 1]), labels[index : index + 1])
        single = torch.autograd.grad(loss, list(alone.parameters()))
        for parameter, expected in zip(model.parameters(), single, strict=True):
            torch.testing.assert_close(parameter.grad_sample[index], expected, rtol=1e-3, atol=1e-5)


def trained(model, images):
    """After some steps of its trainable parameters, in eval mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), torch.tensor([0, 1])).backward()
        optimizer.step()
    return model.eval()


def test_lora_on_the_classifier(library, moves, images):
    """It knows no steerable convolution."""
    peft = library("peft")
    model = timm.create_model("test_c8resnet", pretrained=True).eval()
    with torch.no_grad():
        before = model(images)
    with pytest.raises(ValueError, match="SteerableConv2d"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["layer1.0.conv1.conv"]))
    model = trained(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc"])), images)
    assert moves(model) < 1e-5
    with torch.no_grad():
        assert not torch.allclose(model(images), before, atol=1e-2)


class LowRank(nn.Module):
    """Coefficients plus a product of two thin matrices."""

    def __init__(self, weight, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight[0].numel()) / rank)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


def test_low_rank_coefficients(moves, images):
    """Without PEFT, which would change the pixels of filters."""
    model = timm.create_model("test_c8resnet", pretrained=True).requires_grad_(False).eval()
    with torch.no_grad():
        before = model(images)
    layers = [layer for layer in model.modules() if isinstance(layer, SteerableConv2d)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank=2))
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)  # starts where it was
    trained(model, images)
    with torch.no_grad():
        adapted = model(images)
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert moves(model) < 1e-5
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")  # merged
    with torch.no_grad():
        torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
