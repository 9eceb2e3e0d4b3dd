"""Equivariant layers: plain tensors in and out, regular fields field-major (channel = field * |G| + element)."""

from equivision_timm.layers.block_conv import BlockConv2d, ElementMajor, element_major_stage
from equivision_timm.layers.blur import Blur2d, get_aa_layer
from equivision_timm.layers.checks import check_pointwise, check_positionwise
from equivision_timm.layers.conv import SteerableConv2d, conv_input_shapes, steerable_conv2d
from equivision_timm.layers.conv_norm_act import ConvNormAct
from equivision_timm.layers.field_angle import FieldAngle
from equivision_timm.layers.norm import FieldAttention, FieldNorm
from equivision_timm.layers.pool import GroupPool, InvariantPool
from equivision_timm.layers.strategies.native import NativeConv2d

__all__ = [
    "BlockConv2d",
    "Blur2d",
    "ConvNormAct",
    "ElementMajor",
    "FieldAngle",
    "FieldAttention",
    "FieldNorm",
    "GroupPool",
    "InvariantPool",
    "NativeConv2d",
    "SteerableConv2d",
    "check_pointwise",
    "check_positionwise",
    "conv_input_shapes",
    "element_major_stage",
    "get_aa_layer",
    "steerable_conv2d",
]
