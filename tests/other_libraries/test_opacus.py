"""Opacus: gradients of single samples for differential privacy."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

opacus = pytest.importorskip("opacus", reason="extra `libraries`: opacus")


def test_gradients_of_single_samples(images):
    model = timm.create_model("test_c8resnet", num_classes=3, norm_layer="groupnorm1")
    assert opacus.validators.ModuleValidator.validate(model) == []
    labels, alone = torch.tensor([0, 2]), copy.deepcopy(model)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
    for index in range(2):
        single = torch.autograd.grad(
            F.cross_entropy(alone(images[index : index + 1]), labels[index : index + 1]), list(alone.parameters())
        )
        for parameter, expected in zip(model.parameters(), single, strict=True):
            torch.testing.assert_close(parameter.grad_sample[index], expected, rtol=1e-3, atol=1e-5)
