"""Channel attention of timm, applied to fields: one scale for each field, squeezed over the group and over space."""

from collections.abc import Callable

import torch
import torch.nn as nn
from timm.layers import get_attn

from equivision_timm.layers.checks import check_positionwise
from equivision_timm.torch_state import has_sizes

__all__ = ["FieldAttention"]


class FieldAttention(nn.Module):
    """An attention layer of timm applied to fields: [B, m * |G|, H, W] -> the same, one scale for each field.

    The group axis counts as space, [B, m, |G| * H, W], as in `FieldNorm`: a rotation only permutes positions, which a
    layer that squeezes over all of them does not see. It is timm's own layer (`per_field`).

    Args:
        attn_layer: a name timm knows, such as 'se', 'ese' or 'eca', or a class; must treat all positions alike.

    Raises:
        ValueError: an unknown name, or a layer that depends on the position (CBAM, coordinate attention, ...).
    """

    def __init__(
        self,
        fields: int,
        order: int,
        attn_layer: str | Callable[..., nn.Module] = "se",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        try:
            make = get_attn(attn_layer)
            assert make is not None
            check_positionwise(make, fields)
        except (ValueError, TypeError, AssertionError) as error:  # the latter two from timm
            raise ValueError(
                f"attn_layer {attn_layer!r} is unknown or does not treat all positions alike: use 'se', 'ese' or 'eca'"
            ) from error
        self.fields = fields
        self.order = order
        self.per_field: nn.Module = make(fields, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self._is_empty(x):
            return x
        B, C, H, W = x.shape
        x = x.reshape(B, self.fields, self.order * H, W)  # [B, m * |G|, H, W] -> [B, m, |G| * H, W]
        return self.per_field(x).reshape(B, C, H, W)

    @torch.jit.unused
    def _is_empty(self, x: torch.Tensor) -> bool:
        """Whether there are no images, which timm's 'eca' cannot take."""
        return has_sizes(x) and not torch.compiler.is_compiling() and x.shape[0] == 0
