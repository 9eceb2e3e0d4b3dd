"""Equivariant maps in escnn: the last feature map as a `GeometricTensor`, and a head of escnn's layers on it.

Needs the extra `escnn` (a Fortran compiler, numpy < 2).

    pip install '.[escnn]'
    python scripts/examples/escnn_head.py
"""

import timm
import torch
from escnn import nn as enn

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.escnn_interop import field_type, to_geometric_tensor


class VectorHead(torch.nn.Module):
    """Predicts one vector a pixel that rotates with the image, such as the direction of growth: [B, 2, H / 32, W / 32].

    Args:
        name: a model of this package.
        options: for `timm.create_model`.
    """

    def __init__(self, name: str, **options) -> None:
        super().__init__()
        self.body = timm.create_model(name, num_classes=0, **options)
        fields = self.body.num_features // self.body.group_pool.order
        regular = field_type(self.body.group, fields)
        self.vector = enn.FieldType(regular.gspace, [regular.gspace.irrep(1)])
        self.head = enn.R2Conv(regular, self.vector, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> enn.GeometricTensor:
        return self.head(to_geometric_tensor(self.body.forward_features(x), self.body.group))


def error(model: VectorHead, size: int = 97) -> float:
    """Difference of the vectors of the rotated image from the rotated vectors, by 90 degrees, relative to the norm."""
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        found = model.eval()(image.rot90(1, dims=(-2, -1))).tensor
        x, y = model(image).tensor.rot90(1, dims=(-2, -1)).unbind(1)
        expected = torch.stack([-y, x], dim=1)  # (x, y) rotated counter-clockwise, y pointing up
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    torch.manual_seed(0)
    print(f"error of the vectors under a rotation by 90 degrees: {error(VectorHead('c8resnet18_fast')):.1e}")


if __name__ == "__main__":
    main()
