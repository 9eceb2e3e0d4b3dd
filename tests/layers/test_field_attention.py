"""Attention per field: equivariant, timm's own layers, others refused."""

import pytest
import torch
import torch.nn as nn
from timm.layers import SEModule

from equivision_timm.layers import FieldAttention
from equivision_timm.testing import assert_equivariant

KINDS = {"group": "d4", "input_type": "regular", "output_type": "regular", "in_channels": 64, "size": 9}


def stirred(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("name", ["se", "ese", "eca", "gc"])
def test_equivariant_where_plain_channels_are_not(name):
    layer = stirred(FieldAttention(8, 8, name))
    assert_equivariant(layer, tolerance=1e-5, **KINDS)
    with pytest.raises(AssertionError, match="d4"):  # a scale for each channel instead of each field
        assert_equivariant(stirred(FieldAttention(64, 1, name)), tolerance=1e-5, **KINDS)


def test_one_scale_for_each_field():
    layer, x = stirred(FieldAttention(8, 8, "se")), torch.randn(2, 64, 5, 5)
    scale = (layer(x) / x).reshape(2, 8, -1)  # [B, m * |G|, H, W] -> [B, m, |G| * H * W]
    assert torch.allclose(scale, scale[..., :1].expand_as(scale), atol=1e-4)
    assert scale[..., 0].std() > 0.1
    assert type(layer.per_field) is SEModule


@pytest.mark.parametrize("name", ["cbam", "coord", "halo", "sk", "attention", None, ""])
def test_what_depends_on_the_position_or_is_unknown_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'" if name else "attn_layer"):
        FieldAttention(8, 8, name)
