"""Whether a module is seen to be just what its class says, eager and in torch.compile."""

from types import MethodType

import pytest
import torch
import torch.nn as nn

from equivision_timm.layers.stock import is_stock


class Asks(nn.Module):
    """Adds 1 where its batch norm may be computed in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_stock(self.norm, nn.BatchNorm2d) else x


CHANGES = {
    "none": lambda norm: None,
    "hook": lambda norm: norm.register_forward_hook(lambda *args: None),
    "hook before": lambda norm: norm.register_forward_pre_hook(lambda *args: None),
    "function": lambda norm: setattr(norm, "forward", lambda x: x),  # as offloading libraries do
    "method": lambda norm: setattr(norm, "forward", MethodType(lambda self, x: x, norm)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change, compiled):
    model = Asks()
    CHANGES[change](model.norm)
    torch.compiler.reset()
    function = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert function(torch.zeros(1)).item() == (change == "none")
