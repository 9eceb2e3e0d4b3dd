"""A model for runtimes outside PyTorch: standard operators alone, and still block diagonal.

timm's `reparameterize_model` makes a plain network of dense convolutions, which computes and stores up to ten times as
much as the irreps basis needs. Here the stages keep their blocks.
"""

import copy

import torch.nn as nn
from timm.utils.model import reparameterize_model

from equivision_timm.layers import BlockConv2d, Blur2d, ConvNormAct, ElementMajor, MaxPool2d
from equivision_timm.layers.stock import is_stock
from equivision_timm.models.equivariant_resnet import BasicBlock, Bottleneck

__all__ = ["fuse_blocks"]

_BLOCKS = (BasicBlock, Bottleneck, nn.Sequential)
_ALIKE = (Blur2d, MaxPool2d, nn.Identity)  # compute every channel by itself, all alike


def fuse_blocks(model: nn.Module) -> nn.Module:
    """A copy of `model` for deployment: the same output in eval mode, norms fused, no basis left.

    Convolutions become block diagonal where that costs less (`layers/block_conv.py`), else plain ones; the maps that
    leave the model keep their layout. In PyTorch itself the model as it is computes faster on the CPU, with a C
    compiler. A residual block whose modules have hooks, were replaced, or have another norm or attention, becomes what
    `reparameterize_model` makes of it: dense convolutions.

    Args:
        model: any timm model; those of other packages become what `reparameterize_model` makes of them.
    """
    model = copy.deepcopy(model)
    _fuse_children(model)
    return reparameterize_model(model, inplace=True)


def _fuse_children(module: nn.Module) -> None:
    """Replace the stages inside `module`, or the blocks of a stage that cannot be replaced as a whole."""
    for name, child in module.named_children():
        units = _units(child) if type(child) in _BLOCKS else None
        if not units:
            _fuse_children(child)
            continue
        fused, order = copy.deepcopy(child), units[0].conv.order
        for unit in _units(fused) or []:
            unit.fuse_element_major()
        if any(isinstance(part, BlockConv2d) for part in fused.modules()):
            setattr(module, name, ElementMajor(fused, order).train(child.training))


def _units(module: nn.Module) -> list[ConvNormAct] | None:
    """The units that `module` consists of; None where anything in it could see in which order the channels lie."""
    if is_stock(module, *_ALIKE):
        return []
    if is_stock(module, *_BLOCKS):
        units = [_units(child) for child in module.children()]
        return None if None in units else [unit for own in units for unit in own or []]
    if isinstance(module, ConvNormAct) and module.fuses() and module.conv.input_type == "regular":
        return [module] if isinstance(module.attn, nn.Identity) else None
    return None
