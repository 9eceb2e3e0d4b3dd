"""Arguments and images that would give wrong numbers are refused."""

import pytest
import torch
import torch.nn as nn
from timm.layers import get_norm_layer

from equivision_timm.layers import check_pointwise, check_positionwise
from equivision_timm.models.backbone import CheckImage


def test_activations():
    for act_layer in ("relu", "silu", "gelu", "hard_swish", "leaky_relu", nn.ELU, nn.Identity):
        assert issubclass(check_pointwise(act_layer), nn.Module)
    for act_layer in (nn.GLU, lambda: nn.Softmax(1), nn.Softmax2d, "rellu", "", None):
        with pytest.raises(ValueError, match="act_layer"):
            check_pointwise(act_layer)


def test_norms():
    for norm_layer in ("batchnorm2d", "groupnorm1", "layernorm2d", nn.InstanceNorm2d):
        check_positionwise(get_norm_layer(norm_layer), 8)
    for norm_layer in (lambda fields: nn.LayerNorm([fields, 4, 6]), nn.LayerNorm):
        with pytest.raises(ValueError, match="position"):
            check_positionwise(norm_layer, 8)


def test_images():
    x = torch.zeros(2, 3, 32, 40, dtype=torch.bfloat16)
    assert CheckImage(3)(x) is x
    for shape, word in (((3, 64, 64), "batch"), ((1, 1, 64, 64), "in_chans")):
        with pytest.raises(AssertionError, match=word):
            CheckImage(3)(torch.zeros(shape))
