"""Measure and assert equivariance of layers and models, those of this package and others.

For an element g of the group and an input x, f is equivariant if f(g x) = g f(x). The error of f at g is

    max |f(g x) - g f(x)| / max |f(x) - f(x')|

for smooth random images x and x': relative to how much the output varies with the input, since neither a constant in
the output nor its size says anything about the group. Elements that map the pixel grid onto itself (rotations by 90
degrees, reflections) should reach float accuracy at exact sizes (`model.exact_sizes`), others only up to resampling.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from equivision_timm.errors import check_choice
from equivision_timm.groups import Group, move_pixels

__all__ = ["angle_error", "assert_equivariant", "equivariance_error"]


@torch.no_grad()
def equivariance_error(
    module: nn.Module,
    size: int = 225,
    group: str | None = None,
    input_type: str = "trivial",
    output_type: str = "invariant",
    in_channels: int | None = None,
) -> dict[int, float]:
    """The relative error of `module` at every element of the group.

    Measured on a copy in eval mode, one image at a time; scales (parameters of one dimension, biases apart) that all
    are one number below 0.1, which switch branches off (`zero_init_last`, LayerScale), are set to 1.

    Args:
        module: maps images [1, in_channels, size, size], of its own dtype and device, to a tensor.
        size: side of the square images in pixels.
        group: `module.group` if None.
        input_type: action of the group on the input: 'trivial' (an image: pixels move) or 'regular' (the channels of
            each field are permuted, too).
        output_type: 'invariant' (unchanged, such as logits), 'trivial' or 'regular' maps.
        in_channels: `module.in_chans` if None.

    Returns:
        {element index: error}. The elements of `Group.grid_elements` are exact on the grid, the others resampled.

    Raises:
        ValueError: a module without attributes for group or channels; an output that is not finite, or does not depend
            on the image.
    """
    parsed = Group.from_name(_of(module, "group", "group") if group is None else group)
    channels = _of(module, "in_chans", "in_channels") if in_channels is None else in_channels
    check_choice("input_type", input_type, ("trivial", "regular"))
    check_choice("output_type", output_type, ("invariant", "trivial", "regular"))
    network = copy.deepcopy(module).eval()
    for name, scale in network.named_parameters():
        if scale.ndim < 2 and not name.endswith("bias") and len(scale.unique()) == 1 and scale.abs().max() < 0.1:
            scale.fill_(1)
    like = next(network.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, channels, 9, 9, generator=generator, dtype=torch.float64)
    x = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)

    def run(images: torch.Tensor) -> torch.Tensor:
        y = torch.cat([network(image.to(like)) for image in images.split(1)])  # no use of the place in the batch
        if not y.isfinite().all():
            raise ValueError(f"the output of {type(module).__name__} is not finite: check its weights")
        return y.double().cpu()

    plain = run(x)
    variation = (plain[0] - plain[1]).abs().max().item()
    if variation == 0:
        raise ValueError(f"the output of {type(module).__name__} does not depend on the image: nothing was measured")
    errors = {}
    for g in range(parsed.order):
        expected = _transform(plain, parsed, g, output_type)
        errors[g] = (run(_transform(x, parsed, g, input_type)) - expected).abs().max().item() / variation
    return errors


def assert_equivariant(module: nn.Module, size: int = 225, tolerance: float = 1e-4, **kwargs: Any) -> None:
    """Raise AssertionError if an element that is exact on the pixel grid has an error above `tolerance`.

    Other arguments and errors as in `equivariance_error`.

    Example:
        >>> from equivision_timm.layers import GroupPool
        >>> assert_equivariant(GroupPool(4), 9, group="c4", input_type="regular", output_type="trivial", in_channels=8)
    """
    errors = equivariance_error(module, size, **kwargs)
    group = Group.from_name(kwargs.get("group") or _of(module, "group", "group"))
    wrong = {g: errors[g] for g in group.grid_elements if not errors[g] <= tolerance}
    if wrong:
        listed = ", ".join(f"{g}: {error:.1e}" for g, error in wrong.items())
        hint = "if the output varies little with the image, compared to its size, use module.double()"
        sizes: Any = module.exact_sizes(size) if hasattr(module, "exact_sizes") else (size,)  # type: ignore[operator]
        if size not in sizes:
            hint = f"exact sizes are {' and '.join(map(str, sizes))}; {hint}"
        raise AssertionError(
            f"{type(module).__name__} is not {group.name}-equivariant at {size} x {size} pixels, from input_type "
            f"{kwargs.get('input_type', 'trivial')!r} to output_type {kwargs.get('output_type', 'invariant')!r}: "
            f"relative error by element {{{listed}}} exceeds {tolerance:.0e} ({hint})"
        )


@torch.no_grad()
def angle_error(model: nn.Module, images: torch.Tensor, angles: Sequence[float]) -> dict[str, dict[float, float]]:
    """The error of every stage of `model` under rotations by any angle.

    The error of a map f of the network at an angle is |f(g x) - g f(x)| / |g f(x)|, g the rotation by that angle, over
    the pixels in a disc of 0.8 times the inscribed radius; the mean over the images. g moves pixels (bicubic between
    the quarter turns) and permutes the channels of regular fields, between the rotations of the group by the Fourier
    series of a field. The images are faded to zero towards the border, so that nothing new comes into view.

    Use photographs: equivariance between the quarter turns is broken by aliasing of fine detail, of which smooth random
    images have next to none.

    Args:
        model: a timm model, or another with `forward_intermediates` and `feature_info`. It is measured in eval mode:
            random weights need norms with the statistics of the images, far from the initial 0 and 1.
        images: [B, C, n, n], normalised as the model expects, of its dtype and on its device.
        angles: in degrees, counter-clockwise.

    Returns:
        {stage: {angle: error}}, the stages named as in `feature_info`. 0 is perfect; 1 and more mean that the features
        of the rotated image have next to nothing in common with the rotated features.

    Raises:
        ValueError: a map that is zero in the disc, not finite, or the same for black images.
    """
    t = ((1 - _radius(images.shape[-1])) / 0.15).clamp(0, 1)  # the mask: 1 up to radius 0.85, 0 from 1 on
    images = images * (t * t * (3 - 2 * t)).to(images)
    network = copy.deepcopy(model).eval()
    levels = _maps(network, images)
    for (name, _, found), (_, _, black) in zip(levels, _maps(network, torch.zeros_like(images[:1])), strict=True):
        if (found - black).abs().max() <= 1e-6 * black.abs().max():
            raise ValueError(f"the map of {name} does not depend on the images: nothing was measured")
    errors: dict[str, dict[float, float]] = {name: {} for name, _, _ in levels}
    for angle in angles:
        rotated = _maps(network, _rotate(images, angle))
        for (name, rotations, before), (_, _, after) in zip(levels, rotated, strict=True):
            expected = _rotate(_shift_fields(before, rotations, angle), angle)
            errors[name][angle] = _relative_error(name, after, expected)
    return errors


def _of(module: nn.Module, name: str, argument: str) -> Any:
    """The attribute `name` of `module`, the default of `argument`."""
    if not hasattr(module, name):
        raise ValueError(f"{type(module).__name__} has no attribute {name!r}: give {argument}=")
    return getattr(module, name)


def _maps(model: nn.Module, images: torch.Tensor) -> list[tuple[str, int, torch.Tensor]]:
    """For every stage its name, N of its group, and its map [B, C, H, W]."""
    network: Any = model
    maps = network.forward_intermediates(images, intermediates_only=True)
    return [
        (info["module"], Group.from_name(info.get("group", "c1")).rotations, x.float())
        for info, x in zip(network.feature_info, maps, strict=True)
    ]


def _relative_error(name: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean over the images of |actual - expected| / |expected| in the disc."""
    disc = _radius(expected.shape[-1]).to(expected.device) <= 0.8
    norms = [(x * disc).flatten(1).norm(dim=1) for x in (actual - expected, expected)]  # [B] each
    if not (norms[1].min() > 0 and norms[0].isfinite().all()):
        raise ValueError(
            f"the map of {name}, {list(expected.shape)}, is zero or not finite in the disc of radius 0.8: use larger "
            "images, and none of one colour"
        )
    return (norms[0] / norms[1]).mean().item()


def _radius(n: int) -> torch.Tensor:
    """[n, n]: the distance of each pixel from the centre; 1 at the middle of the border."""
    axis = torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1)
    return torch.hypot(axis[:, None], axis[None, :])


def _rotate(x: torch.Tensor, degrees: float, reflect: bool = False) -> torch.Tensor:
    """Rotate x [B, C, n, n] counter-clockwise, if asked after a reflection: quarter turns exact, others bicubic."""
    quarters, rest = divmod(degrees, 90)
    if rest == 0:
        return move_pixels(x, int(quarters) % 4, reflect)
    cos, sin, sign = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), -1 if reflect else 1
    inverse = x.new_tensor([[sign * cos, -sign * sin, 0], [sin, cos, 0]])  # g^-1 of a point (right, down)
    source = F.affine_grid(inverse.expand(len(x), -1, -1), list(x.shape), align_corners=True)  # [B, n, n, 2]
    return F.grid_sample(x, source, mode="bicubic", align_corners=True)  # zeros come in from outside


def _shift_fields(x: torch.Tensor, rotations: int, degrees: float) -> torch.Tensor:
    """The channels of x [B, m * |G|, H, W] under the rotation: f(k) -> f(k - s), s = degrees N / 360.

    k counts the rotations of C_N; D_N has them twice, without and with the reflection. If s is not an integer, f is its
    Fourier series, f(k) = sum_j c_j exp(2 pi i j k / N), j = -N / 2 ... N / 2.
    """
    functions = x.unflatten(1, (-1, rotations))  # [B, m * |G| / N, N, H, W]
    shift = degrees * rotations / 360
    if shift == round(shift):
        return functions.roll(round(shift), dims=2).flatten(1, 2)
    frequency = torch.arange(rotations // 2 + 1, device=x.device)
    phase = torch.exp(-2j * math.pi * frequency * shift / rotations)
    spectrum = torch.fft.rfft(functions, dim=2) * phase[:, None, None]
    return torch.fft.irfft(spectrum, n=rotations, dim=2).flatten(1, 2)


def _transform(x: torch.Tensor, group: Group, g: int, kind: str) -> torch.Tensor:
    """g x for a batch of kind 'invariant', 'trivial' or 'regular'."""
    if kind == "invariant":
        return x
    if kind == "regular":
        fields = x.unflatten(1, (-1, group.order))  # [B, m, |G|, H, W]
        x = fields[:, :, group.left_quotients()[g]].flatten(1, 2)  # [B, m * |G|, H, W]
    reflected, rotations = divmod(g, group.rotations)
    return _rotate(x, 360 * rotations / group.rotations, bool(reflected))
