"""Checks that an activation is pointwise and that a normalisation treats all positions alike."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
from timm.layers import get_act_layer
from torch.func import functional_call

__all__ = ["check_pointwise", "check_positionwise"]


def check_pointwise(act_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The activation class for a timm name or a class; ValueError if it does not act on every value by itself.

    A pointwise function commutes with every permutation of the values, hence with the group; one that mixes channels
    (GLU, softmax) or treats them differently does not.
    """
    try:
        layer = get_act_layer(act_layer)
    except (KeyError, AssertionError) as error:
        raise ValueError(f"unknown act_layer {act_layer!r}: use a name timm knows, such as 'relu' or 'silu'") from error
    if layer is None or not _commutes_with_permutation(layer, (2, 4, 5, 7), lambda t: t.flatten().roll(11).view_as(t)):
        raise ValueError(
            f"act_layer {act_layer!r} is not pointwise, so the network would not be equivariant: "
            "use one that acts on every value by itself, such as 'relu', 'silu' or 'gelu'"
        )
    return layer


def check_positionwise(norm_layer: Callable[..., nn.Module], fields: int) -> None:
    """ValueError unless a normalisation of [B, fields, H, W] treats all positions alike, as `FieldNorm` needs."""

    def permute(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).roll(5, -1).view_as(x)

    if not _commutes_with_permutation(lambda: norm_layer(fields), (2, fields, 4, 6), permute):
        raise ValueError(
            f"norm_layer {norm_layer!r} depends on the position, so the network would not be equivariant: "
            "use 'batchnorm2d', 'groupnorm', 'layernorm2d' or nn.InstanceNorm2d"
        )


def _commutes_with_permutation(
    make_layer: Callable[[], nn.Module], shape: tuple[int, ...], permute: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether layer(permute(x)) = permute(layer(x)) for an x of `shape`; not so if it changes the shape or fails.

    With real values, whatever mode the caller is in: in a new thread, where fake tensors and the like are off, and with
    values for all parameters and buffers, which may be on the meta device.
    """

    def commutes() -> bool:
        with torch.device("cpu"), torch.no_grad():
            x = torch.linspace(-3, 3, math.prod(shape)).sin().view(shape)
            layer = make_layer()
            held = [*layer.named_parameters(), *layer.named_buffers()]
            values = {name: _values(tensor) for name, tensor in held}
            try:
                before, after = (functional_call(layer, dict(values), (image,)) for image in (x.clone(), permute(x)))
            except (RuntimeError, ValueError, IndexError):
                return False
            return before.shape == x.shape and torch.allclose(permute(before), after, atol=1e-5)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(commutes).result()


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Values from 0.5 to 1.5 in the shape of `tensor`; 0 for a counter."""
    if not tensor.is_floating_point():
        return torch.tensor(0, device="cpu").expand(tensor.shape).clone()
    return torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device="cpu").view(tensor.shape)
