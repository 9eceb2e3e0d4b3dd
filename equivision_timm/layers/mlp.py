"""The multi-layer perceptron of tokens in the irreps basis."""

from collections.abc import Callable

import torch
import torch.nn as nn

from equivision_timm.layers.irreps import ChangeBasis
from equivision_timm.layers.linear import IrrepLinear

__all__ = ["IrrepMlp", "RegularAct"]


class RegularAct(nn.Module):
    """A pointwise activation in the regular basis, of blocks in the irreps basis: [|G|, ..., fields] -> the same.

    In the regular basis the group permutes the channels of a field, which commutes with a function of every value.

    Args:
        act: the activation.
        group: name of the group.
    """

    def __init__(self, act: nn.Module, group: str) -> None:
        super().__init__()
        self.to_regular: ChangeBasis = ChangeBasis(group, "regular")
        self.act = act
        self.to_irreps: ChangeBasis = ChangeBasis(group, "irreps")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_irreps(self.act(self.to_regular(x)))


class IrrepMlp(nn.Module):
    """Linear, activation in the regular basis, linear: [..., |G| * fields] -> the same shape.

    Args:
        fields: number of fields.
        hidden_fields: number of fields between the two linear layers.
        group: name of the group.
        act_layer: pointwise activation.
        drop: dropout behind each linear layer.
        device: where to create the parameters.
        dtype: their type.
    """

    def __init__(
        self,
        fields: int,
        hidden_fields: int,
        group: str,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1: IrrepLinear = IrrepLinear(fields, hidden_fields, group, "blocks", device=device, dtype=dtype)
        self.act: RegularAct = RegularAct(act_layer(), group)
        self.drop1: nn.Dropout = nn.Dropout(drop)
        self.fc2: IrrepLinear = IrrepLinear(hidden_fields, fields, group, "tokens", device=device, dtype=dtype)
        self.drop2: nn.Dropout = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop1(self.act(self.fc1(x)))  # [|G|, ..., hidden_fields]
        return self.drop2(self.fc2(x))
