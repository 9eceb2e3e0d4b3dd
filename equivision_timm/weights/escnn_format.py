"""Translation of ResNets in the format of escnn and e2cnn, which the original projects are written with.

A convolution holds its coefficients `weights`, one flat vector in the order (output field o, input field i, basis
element b), the order of `weight` [out_fields, in_fields, n_basis, 1] here. Other entries may determine the basis:

- `sampled_basis` B' [n_basis, |G|, H, k^2]: sum_b w'_b B'_b = sum_b w_b B_b gives w = w' T with T B = B', by least
  squares, exact since both span the same space;
- `filter` K [O |G|, I H, k, k], the expanded filter: sum_b w_b B_b = K gives w likewise;
- neither: the coefficients are taken as they are.
"""

import torch

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.layers import ConvNormAct, SteerableConv2d
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.weights.checkpoint import Entries, Translation
from equivision_timm.weights.signs import element_signs

__all__ = ["translate_basis", "translate_resnet"]

_TOLERANCE = 1e-4  # relative residual of least squares; float32 leaves 1e-6


def translate_resnet(
    state_dict: dict[str, torch.Tensor], model: EquivariantResNet, signs: str | None = None
) -> Translation:
    """The entries of `model` from those of the same network in escnn.

    `signs` is the sign pattern of the basis of coefficients (`signs.py`). The note `basis_from` names the entries that
    determined the coefficients: 'sampled_basis', 'filter', 'coefficients'.

    Raises:
        WeightsError: entries are missing or of another shape; a basis or filter of another group; a filter that
            contradicts the coefficients; a basis in a part of the convolutions, or besides `signs`.
        InputError: `signs` is not a pattern of this group.
    """
    order, entries = Group.from_name(model.group).order, Entries(state_dict)
    found: dict[str, torch.Tensor] = {}
    sources = set()
    for name, unit in model.named_modules():
        if not isinstance(unit, ConvNormAct):
            continue
        conv, norm = _names(name)
        weight, source = _coefficients(entries, conv, unit.conv)
        found[f"{name}.conv.weight"] = weight if signs is None else weight * element_signs(unit.conv.kernel, signs)
        sources.add(source)
        for key in unit.norm.per_field.state_dict():
            found[f"{name}.norm.per_field.{key}"] = entries.take(f"{norm}.batch_norm_[{order}].{key}")
    basis = "+".join(sorted(sources - {"coefficients"}))
    if basis and (signs is not None or "coefficients" in sources):
        raise WeightsError(
            f"the checkpoint holds the {basis} of {'some' if 'coefficients' in sources else 'all'} convolutions: save "
            "that of all, and leave signs out"
        )
    found |= {f"fc.{key}": entries.take(f"fc.{key}") for key in model.fc.state_dict()}
    entries.left = {name: value for name, value in entries.left.items() if f"indices_{order}" not in name}
    return Translation(entries.finish(found), notes={"basis_from": basis or "coefficients"})


def _names(unit: str) -> tuple[str, str]:
    """Names of convolution and norm in escnn: 'layer1.0.conv2' -> ('layer1.0.conv2', 'layer1.0.bn2')."""
    parent, dot, last = unit.rpartition(".")
    if last == "downsample":
        return f"{unit}.0", f"{unit}.1"
    return unit, f"{parent}{dot}{last.replace('conv', 'bn')}"


def _coefficients(entries: Entries, name: str, conv: SteerableConv2d) -> tuple[torch.Tensor, str]:
    """Coefficients [out_fields, in_fields, n_basis, 1], and what determined them."""
    basis = load_kernel_basis(conv.kernel).sample()  # [n_basis, |G|, H, k, k]
    (o, i), (count, order, h, *size) = conv.weight.shape[:2], basis.shape
    weight = entries.take(f"{name}.weights", o * i * count).float().reshape(o, i, count)
    source = "coefficients"
    for key in [key for key in entries.left if key.startswith(f"{name}._basis") and key.endswith("sampled_basis")][:1]:
        translation = translate_basis(entries.take(key, *basis.flatten(3).shape), basis, name)
        weight, source = (weight.double() @ translation).float(), "sampled_basis"
    if f"{name}.filter" in entries.left:
        filters = entries.take(f"{name}.filter", o * order, i * h, *size)
        blocks = filters.unflatten(0, (o, order)).unflatten(2, (i, h)).transpose(1, 2)  # [O, I, |G|, H, k, k]
        solved, given = _solve(blocks.flatten(2).flatten(0, 1), basis, name).float().view(o, i, count), weight
        if source == "coefficients":  # the basis of the file may have other signs
            weight, source = solved, "filter"
            solved, given = solved.abs(), given.abs()
        difference = ((given - solved).abs().max() / solved.abs().max().clamp_min(1e-30)).item()
        if not difference <= 1e-3 + 4 * torch.finfo(filters.dtype).eps:
            raise WeightsError(f"{name}.weights and its filter disagree (relative error {difference:.1e})")
    return weight.unsqueeze(-1), source


def translate_basis(source: torch.Tensor, target: torch.Tensor, name: str) -> torch.Tensor:
    """T [n_basis, n_basis] with T target = source [n_basis, |G|, H, ...], so that w T are coefficients in `target`.

    Raises WeightsError, with the `name` of the convolution, if the two span different spaces.
    """
    translation = _solve(source.flatten(1), target, name)
    signs = translation.round()
    is_signs = torch.allclose(translation, signs, rtol=0, atol=1e-5)  # without rounding errors then
    return signs if is_signs else translation


def _solve(rows: torch.Tensor, basis: torch.Tensor, name: str) -> torch.Tensor:
    """X [n, n_basis], float64, with X basis = rows [n, values] by least squares."""
    values, flat = rows.double(), basis.double().flatten(1)
    solution = values @ torch.linalg.pinv(flat)
    residual = ((solution @ flat - values).abs().max() / values.abs().max().clamp_min(1e-30)).item()
    if not residual <= _TOLERANCE + torch.finfo(rows.dtype).eps:
        raise WeightsError(
            f"the kernels of {name} are not equivariant under the group of this model (relative residual "
            f"{residual:.1e}): the checkpoint belongs to another group"
        )
    return solution
