"""Equivariant layers: plain tensors in and out, regular fields field-major (channel = field * |G| + element)."""

from equivision_timm.layers.block_conv import BlockConv2d, ElementMajor
from equivision_timm.layers.blur import Blur2d, get_aa_layer
from equivision_timm.layers.checks import CheckImage, check_pointwise, check_positionwise
from equivision_timm.layers.conv import SteerableConv2d, steerable_conv2d
from equivision_timm.layers.conv_norm_act import ConvNormAct
from equivision_timm.layers.field_attention import FieldAttention
from equivision_timm.layers.norm import FieldNorm
from equivision_timm.layers.pool import GroupPool, InvariantPool, MaxPool2d

__all__ = [
    "BlockConv2d",
    "Blur2d",
    "CheckImage",
    "ConvNormAct",
    "ElementMajor",
    "FieldAttention",
    "FieldNorm",
    "GroupPool",
    "InvariantPool",
    "MaxPool2d",
    "SteerableConv2d",
    "check_pointwise",
    "check_positionwise",
    "get_aa_layer",
    "steerable_conv2d",
]
