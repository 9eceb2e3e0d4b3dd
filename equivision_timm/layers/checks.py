"""Checks that an activation is pointwise and that a normalisation treats all positions alike."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
from timm.layers import get_act_layer

__all__ = ["check_pointwise", "check_positionwise"]


def check_pointwise(act_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The activation class for a timm name or a class; ValueError unless it acts on every value by itself.

    A pointwise function commutes with every permutation of the values, hence with the group; one that mixes channels
    (GLU, softmax) or treats them differently does not.
    """
    try:
        layer = get_act_layer(act_layer)
    except KeyError:
        layer = None
    if layer is None or not _commutes_with_permutation(layer, (2, 4, 5, 7), lambda t: t.flatten().roll(11).view_as(t)):
        raise ValueError(
            f"act_layer {act_layer!r} is unknown or not pointwise, so the network would not be equivariant: use one "
            "that acts on every value by itself, such as 'relu', 'silu' or 'gelu'"
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

    In a new thread, where the caller's modes (fake tensors, inference, a default device) are off.
    """

    def commutes() -> bool:
        with torch.no_grad():
            x = torch.linspace(-3, 3, math.prod(shape)).sin().view(shape)
            layer = make_layer()
            for parameter in layer.parameters():  # equal ones would hide that they belong to positions
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
            try:
                before, after = layer(x.clone()), layer(permute(x))
            except (RuntimeError, ValueError, IndexError):
                return False
            return before.shape == x.shape and torch.allclose(permute(before), after, atol=1e-5)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(commutes).result()
