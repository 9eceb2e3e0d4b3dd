"""Attributes and models of a given type, or an error that says what is there."""

import pytest
import timm
import torch
import torch.nn as nn

from equivision_timm.models import EquivariantResNet, EquivariantViT
from equivision_timm.models.attributes import attribute
from equivision_timm.models.variants import create


def test_attributes():
    model = timm.create_model("test_c8resnet")
    assert attribute(model, "num_classes", int) == 10
    assert attribute(model, "pretrained_cfg", dict)["input_size"] == (3, 65, 65)
    with pytest.raises(TypeError, match="num_classes of a EquivariantResNet is 10, where str is needed"):
        attribute(model, "num_classes", str)
    with pytest.raises(TypeError, match="out_features of a Identity is None, where int is needed"):
        attribute(nn.Identity(), "out_features", int)


def test_models():
    with torch.device("meta"):
        assert create("test_c8resnet", EquivariantResNet, num_classes=3).num_classes == 3
        assert type(create("test_d4vit", EquivariantResNet, EquivariantViT)) is EquivariantViT
        with pytest.raises(ValueError, match="test_d4vit is a EquivariantViT, no EquivariantResNet"):
            create("test_d4vit", EquivariantResNet)
