"""A copy of a model for inference: norms folded into constant weights, each convolution in the form that is fastest."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from timm.layers import DropBlock2d, DropPath
from timm.utils.model import reparameterize_model

from equivision_timm.errors import check_choice
from equivision_timm.layers import ConvNormAct, NativeConv2d, SteerableConv2d, conv_input_shapes
from equivision_timm.layers.conv import is_watched
from equivision_timm.layers.strategies import STRATEGIES, native_library
from equivision_timm.models.equivariant_convnext import EquivariantConvNeXtStage

__all__ = ["fuse"]

_FORMS = ("native", "blocks", "dense")


def fuse(model: nn.Module, form: str | None = None, input_size: int | tuple[int, int, int] | None = None) -> nn.Module:
    """A copy of `model` for inference: the same output in eval mode, several times faster; its weights are constants.

    Call it last, on the device and in the type in which the copy will run. It can be copied, pickled, run under
    autocast, and differentiated with respect to the image. Units whose modules have hooks or were replaced stay as they
    are; of ConvNeXts, stages. In vision transformers only the filter of the patches becomes a constant. Models of other
    packages become what timm's `reparameterize_model` returns.

    Args:
        model: a model, or any module that contains layers of this package.
        form: 'native', convolutions of ResNets in C, on a CPU; 'blocks', standard operators, block diagonal where that
            costs less: for ONNX and other runtimes; 'dense', plain convolutions and linear layers; None: 'native' on a
            CPU if the C code is available, else 'dense'.
        input_size: side of the images in pixels, or (channels, height, width), for which 'native' chooses between C
            and a plain convolution, layer by layer; other sizes give the same output. Default: `input_size` of the
            model's configuration. A layer whose `conv_strategy` is 'expand' or 'block_diagonal' is never in C.

    Raises:
        RuntimeError: 'native' is not available for this model on this machine; the message says why.

    Example:
        >>> import timm, equivision_timm
        >>> model = timm.create_model("test_c8resnet").eval()
        >>> fused = equivision_timm.fuse(model, "blocks")
        >>> x = torch.rand(1, 3, 65, 65)
        >>> torch.allclose(fused(x), model(x), atol=1e-4)
        True
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    reason = native_library.why_not() if device.type == "cpu" else f"the model is on {device}"
    form = form or ("dense" if reason else "native")
    check_choice("form", form, _FORMS)
    if form == "native" and reason:
        raise RuntimeError(f"form 'native' is not available: {reason}. Use form 'blocks' or 'dense'")
    root = nn.Sequential(copy.deepcopy(model).eval().requires_grad_(False))  # so that the model itself is a child
    if form == "native":
        shapes = _shapes(model, input_size)
        _replace(root, lambda name, layer: _native(name.removeprefix("0."), layer, shapes))
    if form == "dense":
        _replace(root, lambda name, layer: layer.fuse())
    if form != "blocks":
        for module in root.modules():
            if isinstance(module, EquivariantConvNeXtStage):
                module.fold(form)
    return next(reparameterize_model(root, inplace=True).children()).requires_grad_(False)


def _replace(
    parent: nn.Module, make: Callable[[str, ConvNormAct | SteerableConv2d], nn.Module], prefix: str = ""
) -> None:
    """Put `make(name, layer)` in the place of each unit of convolution and norm, and of each other convolution."""
    for name, child in parent.named_children():
        if isinstance(child, (ConvNormAct, SteerableConv2d)):
            setattr(parent, name, make(prefix + name, child))
        else:
            _replace(child, make, f"{prefix}{name}.")


def _native(name: str, layer: ConvNormAct | SteerableConv2d, shapes: dict[str, torch.Size]) -> nn.Module:
    """`layer` with its convolution in C where it is to be computed so, else dense and channels-last."""
    if isinstance(layer, SteerableConv2d):
        return layer if is_watched(layer) else _native_conv(name, layer, layer.weight, None, shapes)
    make = partial(_native_conv, f"{name}.conv", shapes=shapes)
    if _is_one_call(layer) and (folded := layer.folded()) is not None:
        conv = make(layer.conv, *folded, relu=type(layer.act) is nn.ReLU)
        if isinstance(conv, NativeConv2d):
            return conv if type(layer.even) is nn.Identity else nn.Sequential(layer.even, conv)
    return layer.replace_conv(make)


def _is_one_call(unit: ConvNormAct) -> bool:
    """Whether, in eval mode, the unit is its convolution and norm, then the shortcut, then ReLU or nothing."""
    passes = type(unit.attn) is nn.Identity and type(unit.drop) in (nn.Identity, DropPath, DropBlock2d)
    acts = type(unit.act) in (nn.ReLU, nn.Identity)
    watched = any(map(is_watched, unit.modules()))
    return type(unit) is ConvNormAct and unit.is_fusible() and passes and acts and not watched


def _native_conv(
    name: str,
    conv: SteerableConv2d,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shapes: dict[str, torch.Size],
    relu: bool = False,
) -> nn.Module:
    """In C if that is the layer's strategy for its input, or, without a known input, wherever it can be."""
    layer = conv.describe(conv.weight.device, conv.weight.dtype)
    if name in shapes:
        strategy = conv.strategy_for(shapes[name], layer.device, layer.dtype)
    else:
        strategy = "expand" if STRATEGIES["native"].supports(layer) else "native"
    if strategy == "native":
        return NativeConv2d(layer, weight, bias, relu)
    return conv.dense_conv(weight, bias).to(memory_format=torch.channels_last)


def _shapes(model: nn.Module, input_size: int | tuple[int, int, int] | None) -> dict[str, torch.Size]:
    """The input of each convolution for one image; nothing for a module without `input_size` in its configuration."""
    size = input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        return {}
    channels, *sides = (3, size, size) if isinstance(size, int) else size
    image = next(model.parameters()).new_zeros(1, getattr(model, "in_chans", channels), *sides)
    return conv_input_shapes(model, image)
