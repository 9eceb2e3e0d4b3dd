"""Names and coefficients of ReDet's ReResNets, written with e2cnn -> those of ours.

Each convolution carries its kernel basis (`sampled_basis`), so that there is no sign to guess: with S the kernels of
the file and B ours, the coefficients w become w T where T B = S.
"""

import re
from dataclasses import dataclass

import torch

from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.layers import ConvNormAct
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.variants import create
from equivision_timm.weights.change_of_basis import translate_basis

__all__ = ["Translation", "translate"]

_UNUSED = re.compile(r"\.filter$|\.indices_8$|\.sampled_basis$")  # follow from the rest; the bases are used on the way
_NORM = "batch_norm_[8]."


@dataclass(frozen=True)
class Translation:
    """A state dict of ours.

    Attributes:
        state_dict: the entries of the model, float32.
        has_classifier: whether the file holds the ImageNet classifier.
        residual: largest relative residual of the change of basis.
        dropped: names of entries that belong to a detector around the backbone.
        kernels: those that the coefficients are of.
    """

    state_dict: dict[str, torch.Tensor]
    has_classifier: bool
    residual: float
    dropped: tuple[str, ...]
    kernels: frozenset[Kernel]


def translate(tensors: dict[str, torch.Tensor], model_name: str) -> Translation:
    """The entries of a file as a state dict of `model_name`.

    Args:
        tensors: {name: tensor} of a classifier or of a detector, with or without `backbone.` in front of the names.
        model_name: 'c8reresnet50' or 'c8reresnet101'.

    Raises:
        ValueError: entries are missing, left over or of another shape, a basis is missing or another one: the file is
            of another model.
    """
    prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    heads = {name: value for name, value in tensors.items() if prefix and not name.startswith(prefix)}
    heads |= {name: own.pop(name) for name in list(own) if name.startswith("head.")}
    classifier = {name.removeprefix("head."): heads.pop(name) for name in list(heads) if name.startswith("head.fc.")}
    with torch.device("meta"):
        model = create(model_name, EquivariantResNet, num_classes=1000 if classifier else 0)
    units = {name: module for name, module in model.named_modules() if isinstance(module, ConvNormAct)}

    found: dict[str, torch.Tensor] = dict(classifier)
    used, residual = set(), 0.0
    for name, unit in units.items():
        parent, _, last = name.rpartition(".")
        conv, norm = (f"{name}.0", f"{name}.1") if last == "downsample" else (name, _norm_name(parent, last))
        if f"{conv}.weights" not in own:
            raise ValueError(f"there is no entry {conv}.weights: this is no checkpoint of {model_name}")
        found[f"{name}.conv.weight"], error = _coefficients(own, conv, unit)
        residual = max(residual, error)
        used.add(f"{conv}.weights")
        for key in [key for key in own if key.startswith(f"{norm}.{_NORM}")]:
            found[f"{name}.norm.per_field.{key.removeprefix(f'{norm}.{_NORM}')}"] = own[key]
            used.add(key)
    left = [name for name in own if name not in used and not _UNUSED.search(name)]
    if left:
        raise ValueError(f"{len(left)} entries are none of {model_name}, such as {left[0]}")
    for name, expected in model.state_dict().items():
        if name not in found or found[name].shape != expected.shape:
            has = tuple(found[name].shape) if name in found else "missing"
            raise ValueError(f"{name} of {model_name} should have shape {tuple(expected.shape)}, but it is {has}")
    state_dict = {name: found[name].to(value.dtype).clone() for name, value in model.state_dict().items()}
    return Translation(state_dict, bool(classifier), residual, tuple(heads), frozenset(model.kernels()))


def _norm_name(parent: str, conv: str) -> str:
    """'layer1.0', 'conv2' -> 'layer1.0.bn2'."""
    return f"{parent}.{conv.replace('conv', 'bn')}".lstrip(".")


def _coefficients(own: dict[str, torch.Tensor], conv: str, unit: ConvNormAct) -> tuple[torch.Tensor, float]:
    """w [O, I, n_basis, 1] in our basis, and the residual."""
    bases = [value for name, value in own.items() if name.startswith(f"{conv}._basis") and "sampled_basis" in name]
    if len(bases) != 1:
        raise ValueError(f"{conv} carries {len(bases)} sampled_basis, where one is needed: take the file as published")
    basis = load_kernel_basis(unit.conv.kernel).sample().flatten(3)  # B [n_basis, 8, H, k * k]
    if bases[0].shape != basis.shape or own[f"{conv}.weights"].numel() != unit.conv.weight.numel():
        raise ValueError(
            f"{conv} has kernels {list(bases[0].shape)} and {own[f'{conv}.weights'].numel()} coefficients, where "
            f"{list(basis.shape)} and {unit.conv.weight.numel()} are needed: the checkpoint is of another model"
        )
    translation, residual = translate_basis(bases[0], basis, conv)
    weight = own[f"{conv}.weights"].reshape(unit.conv.weight.shape[:3])  # from (o, i, b), flat
    return (weight.double() @ translation).float().unsqueeze(-1), residual
