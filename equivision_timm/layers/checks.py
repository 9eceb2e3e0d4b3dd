"""What may enter an equivariant network: images, pointwise activations, normalisations that ignore positions."""

from collections.abc import Callable

import torch
import torch.nn as nn
from timm.layers import get_act_layer
from torch import _assert

__all__ = ["CheckImage", "check_pointwise", "check_positionwise"]


class CheckImage(nn.Module):
    """Passes images [B, in_chans, H, W] on, and says what is wrong with anything else.

    Args:
        in_chans: channels expected.
        min_size: the smallest side in pixels that leaves the network something to pool.

    Raises:
        AssertionError: at the forward pass, where shape or type do not fit.
    """

    def __init__(self, in_chans: int, min_size: int = 32) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.min_size = min_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _assert(x.ndim == 4, f"expected a batch of images [B, C, H, W], got {x.ndim} dimension(s): add the batch axis")
        _assert(
            x.shape[1] == self.in_chans,
            f"expected {self.in_chans} image channel(s), got {x.shape[1]}: create the model with in_chans={x.shape[1]}",
        )
        _assert(
            x.is_floating_point(),
            f"expected floating-point images, got {x.dtype}: convert with x.float() and normalise",
        )
        _assert(x.shape[2] >= self.min_size, f"image height {x.shape[2]} is too small: use at least {self.min_size}")
        _assert(x.shape[3] >= self.min_size, f"image width {x.shape[3]} is too small: use at least {self.min_size}")
        return x


def check_pointwise(act_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The activation class for a timm name or a class, if it acts on every value by itself.

    A pointwise function commutes with every permutation of the values, hence with the group; one that mixes channels
    (GLU, softmax) or treats them differently does not.

    Raises:
        ValueError: unknown name, or not pointwise.
    """
    try:
        layer = get_act_layer(act_layer)
    except (KeyError, AssertionError) as error:
        raise ValueError(f"unknown act_layer {act_layer!r}: use a name timm knows, such as 'relu' or 'silu'") from error
    x = torch.linspace(-3, 3, 2 * 4 * 5 * 7, device="cpu").view(2, 4, 5, 7)
    if layer is None or not _commutes_with_permutation(layer, x, lambda t: t.flatten().roll(11).view_as(t)):
        raise ValueError(
            f"act_layer {act_layer!r} is not pointwise, so the network would not be equivariant: "
            "use one that acts on every value by itself, such as 'relu', 'silu' or 'gelu'"
        )
    return layer


def check_positionwise(norm_layer: Callable[..., nn.Module], fields: int) -> None:
    """Accepts a normalisation of [B, fields, H, W] that treats all positions alike, as `FieldNorm` needs.

    Raises:
        ValueError: moving the positions does not just move the output.
    """
    x = torch.linspace(-3, 3, 2 * fields * 4 * 6, device="cpu").view(2, fields, 4, 6).sin()
    if not _commutes_with_permutation(lambda: norm_layer(fields), x, lambda t: t.flatten(2).roll(5, -1).view_as(t)):
        raise ValueError(
            f"norm_layer {norm_layer!r} depends on the position, so the network would not be equivariant: "
            "use 'batchnorm2d', 'groupnorm', 'layernorm2d' or 'instancenorm2d'"
        )


def _commutes_with_permutation(
    make_layer: Callable[[], nn.Module], x: torch.Tensor, permute: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether layer(permute(x)) = permute(layer(x)); a layer that changes the shape or fails does not."""
    with torch.device("cpu"), torch.no_grad():
        layer = make_layer()
        try:
            before, after = layer(x.clone()), layer(permute(x))
        except (RuntimeError, ValueError, IndexError):
            return False
    return before.shape == x.shape and torch.allclose(permute(before), after, atol=1e-5)
