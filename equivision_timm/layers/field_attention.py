"""Channel attention of timm, applied to fields: one scale for each field, squeezed over the group and over space."""

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from timm.layers import get_attn, register_notrace_module

from equivision_timm.layers.checks import check_positionwise
from equivision_timm.layers.norm import FieldNorm

__all__ = ["FieldAttention"]


class FieldAttention(FieldNorm):
    """An attention layer of timm, applied to fields as `FieldNorm` applies a norm: one scale for each field.

    A rotation only permutes positions of [B, m, |G| * H, W], which a layer that squeezes over all of them ignores.

    Args:
        attn_layer: a name timm knows, such as 'se', 'ese' or 'eca', or a class; must treat all positions alike.
        kwargs: `device` and `dtype`.

    Raises:
        ValueError: an unknown name, or a layer that depends on the position (CBAM, coordinate attention, ...).
    """

    def __init__(
        self, fields: int, order: int, attn_layer: str | Callable[..., nn.Module] = "se", **kwargs: Any
    ) -> None:
        try:
            make = get_attn(attn_layer)
            assert make is not None
            check_positionwise(make, fields)
        except (ValueError, TypeError, AssertionError) as error:  # the latter two from timm
            raise ValueError(
                f"attn_layer {attn_layer!r} is unknown or does not treat all positions alike: use 'se', 'ese' or 'eca'"
            ) from error
        super().__init__(fields, order, make, **kwargs)


register_notrace_module(FieldAttention)
