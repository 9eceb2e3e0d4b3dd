"""Regular fields read as angles: the direction or the axis of what an image shows."""

import torch
import torch.nn as nn

from equivision_timm.constants import constant, constant_like
from equivision_timm.groups import Group, circle

__all__ = ["FieldAngle"]


class FieldAngle(nn.Module):
    """Regular fields -> angles that rotate and reflect with the image: [B, in_fields * |G|, ...] -> [B, angles, ...].

    Angles in radians, counter-clockwise from the axis that points to the right, modulo 2 pi / `frequency`: a direction
    for frequency 1 (period 360 degrees), an axis for frequency 2 (180 degrees). An angle is the phase of a Fourier
    coefficient of the fields x over the group, of frequency q,

        v = sum_i sum_h rho(h) w_i x_i[h],  rho(r^k f^p) = R(2 pi q k / N) ((-1)^q diag(1, -1))^p,  angle = phase(v) / q

    with R a rotation of the plane and one weight w_i in the plane for each field: all linear maps from the fields to v
    with v(g x) = rho(g) v(x). So r^k adds 2 pi k / N to the angle a, and the reflection f makes pi - a of it.

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapters 2 and 5.

    Args:
        frequency: of the coefficient, at least 1 and less than N / 2.
        angles: number of outputs.

    Example:
        >>> import timm
        >>> network = timm.create_model("test_c8resnet", num_classes=0, group_pool="").eval()  # fields over the group
        >>> model = nn.Sequential(network, FieldAngle(32, "c8"))
        >>> x = torch.randn(2, 3, 65, 65)
        >>> difference = model(x.rot90(1, dims=(-2, -1))) - model(x)
        >>> torch.allclose(difference.cos(), torch.zeros(2, 1), atol=1e-3)  # 90 or -270 degrees
        True
    """

    def __init__(self, in_fields: int, group: str, frequency: int = 1, angles: int = 1) -> None:
        super().__init__()
        rotations = Group.from_name(group).rotations
        if not 1 <= frequency < rotations / 2:
            raise ValueError(f"frequency {frequency!r} is too high for {group!r}: use 1 or more, below N / 2")
        self.group: str = group
        self.frequency: int = frequency
        self.weight: nn.Parameter = nn.Parameter(torch.empty(angles, in_fields, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def vector(self, x: torch.Tensor) -> torch.Tensor:
        """v [B, angles, ..., 2]; its phase is the angle, its length a measure of confidence."""
        rho = constant_like(self.weight, _rho, self.group, self.frequency)  # [|G|, 2, 2]
        matrix = torch.einsum("hij,afj->aifh", rho, self.weight).flatten(2).flatten(0, 1)  # [angles * 2, fields * |G|]
        v = nn.functional.linear(x.movedim(1, -1), matrix)  # [B, ..., angles * 2]
        return v.unflatten(-1, (-1, 2)).movedim(-2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.vector(x)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return torch.atan2(v[..., 1], v[..., 0]) / self.frequency

    def loss(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """The mean of 1 - cos(frequency * (forward(x) - angle)), `angle` the target [B, angles, ...] in radians."""
        phase = self.frequency * angle
        v = nn.functional.normalize(self.vector(x), dim=-1)
        return (1 - v[..., 0] * phase.cos() - v[..., 1] * phase.sin()).mean()

    def extra_repr(self) -> str:
        angles, fields, _ = self.weight.shape
        return f"{fields}, {self.group!r}, frequency={self.frequency}, angles={angles}"


@constant
def _rho(group: str, frequency: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[|G|, 2, 2]: rho of every element."""
    found = Group.from_name(group)
    n, points = found.rotations, circle(found.rotations)
    rows = [[[c, -s], [s, c]] for c, s in (points[frequency * k % n] for k in range(n))]
    rho = torch.tensor(rows, dtype=torch.float64, device="cpu")  # [N, 2, 2]
    if found.reflections:
        reflection = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu") * (-1) ** frequency
        rho = torch.cat([rho, rho * reflection])
    return rho.to(device, dtype)
