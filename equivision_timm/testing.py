"""Is it equivariant? A measurement and an assertion, for our layers and models and for those of users.

For an element g of the group and an input x, f is equivariant when f(g x) = g f(x). The error of f at g is

    max |f(g x) - g f(x)| / max |f(x)|

over a batch of smooth random images. Elements that map the pixel grid onto itself (quarter turns, mirrors) should
reach float accuracy at exact sizes (n = 1 mod 32 for the ResNets); other elements only up to resampling.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from equivision_timm.groups import Group

__all__ = ["assert_equivariant", "equivariance_error"]


def equivariance_error(
    module: nn.Module,
    size: int = 225,
    group: str | None = None,
    input_type: str = "trivial",
    output_type: str = "invariant",
    in_channels: int | None = None,
    seed: int = 0,
) -> dict[int, float]:
    """The relative error of `module` at every element of the group, measured in eval mode.

    Args:
        module: maps a batch [2, in_channels, size, size], of its own dtype and device, to a tensor.
        size: side of the square images in pixels.
        group: name of the group; `module.group` where None.
        input_type: how the group acts on the input: 'trivial' (an image: pixels move) or 'regular' (and the channels
            of each field are permuted).
        output_type: 'invariant' (unchanged, such as logits), 'trivial' or 'regular' maps.
        in_channels: channels of the input; `module.in_chans` where None.
        seed: of the random images.

    Returns:
        {element index: error}. The elements of `Group.grid_elements` are exact on the grid, the others resampled.

    Raises:
        ValueError: an unknown type; or the output is zero or the same for both images, so that nothing was measured.
    """
    parsed = Group.from_name(module.group if group is None else group)
    in_channels = module.in_chans if in_channels is None else in_channels
    for name, value, known in (
        ("input_type", input_type, ("trivial", "regular")),
        ("output_type", output_type, ("invariant", "trivial", "regular")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use one of {known}")

    parameter = next(module.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, in_channels, 9, 9, generator=generator, dtype=torch.float64)
    x = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)

    def run(image: torch.Tensor) -> torch.Tensor:
        return module(image.to(parameter)).double().cpu()

    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            plain = run(x)
            scale = plain.abs().max().item()
            if not scale > 0 or torch.equal(plain[0], plain[1]):
                raise ValueError(
                    f"the output of {type(module).__name__} is zero, not finite or does not depend on the image: "
                    "there is nothing to measure"
                )
            errors = {}
            for g in range(parsed.order):
                expected = _transform(plain, parsed, g, output_type)
                errors[g] = (run(_transform(x, parsed, g, input_type)) - expected).abs().max().item() / scale
    finally:
        module.train(was_training)
    return errors


def assert_equivariant(module: nn.Module, size: int = 225, tolerance: float = 1e-4, **kwargs) -> None:
    """Raises AssertionError where an element that is exact on the pixel grid has an error above `tolerance`.

    Other arguments as in `equivariance_error`.

    Example:
        >>> from equivision_timm.layers import GroupPool
        >>> assert_equivariant(GroupPool(4), 9, group="c4", input_type="regular", output_type="trivial", in_channels=8)
    """
    errors = equivariance_error(module, size, **kwargs)
    group = Group.from_name(kwargs.get("group") or module.group)
    wrong = {g: errors[g] for g in group.grid_elements if not errors[g] <= tolerance}
    if wrong:
        listed = ", ".join(f"{g}: {error:.1e}" for g, error in wrong.items())
        raise AssertionError(
            f"{type(module).__name__} is not {group.name}-equivariant at {size} x {size} pixels: relative error by "
            f"element {{{listed}}} exceeds {tolerance:.0e} (the ResNets are exact at sizes n = 1 mod 32)"
        )


def _transform(x: torch.Tensor, group: Group, g: int, kind: str) -> torch.Tensor:
    """g x for a float64 batch of kind 'invariant', 'trivial' or 'regular'."""
    if kind == "invariant":
        return x
    if group.quarter_turns(g) is not None:
        return group.transform_fields(x, g) if kind == "regular" else group.transform_image(x, g)
    if kind == "regular":
        fields = x.unflatten(1, (-1, group.order))  # [B, m, |G|, H, W]
        x = fields[:, :, group.left_quotients()[g]].flatten(1, 2)  # [B, m * |G|, H, W]
    return _resample(x, group, g)


def _resample(x: torch.Tensor, group: Group, g: int) -> torch.Tensor:
    """Move the pixels of x [B, C, H, W] by any element, with bicubic interpolation; zeros come in from outside."""
    axis = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    y, x_axis = torch.meshgrid(-axis, axis, indexing="ij")  # y points up
    radius, angle = torch.hypot(x_axis, y), group.inverse_angle(g, torch.atan2(y, x_axis))
    source = torch.stack([radius * torch.cos(angle), -radius * torch.sin(angle)], dim=-1)  # g^-1 x: [H, W, 2]
    return F.grid_sample(x, source.expand(x.shape[0], -1, -1, -1), mode="bicubic", align_corners=True)
