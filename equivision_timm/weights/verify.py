"""Is a model what it claims to be? Checks of weights that are about to be used or published, one row each."""

import copy
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import resolve_pretrained_cfg
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from equivision_timm.arguments import one_line
from equivision_timm.files import file_sha256
from equivision_timm.groups import Group
from equivision_timm.images.folder import ImageFolder
from equivision_timm.images.from_timm import preparation
from equivision_timm.images.photographs import load_crops
from equivision_timm.kernel_basis import are_bases, bases_sha256
from equivision_timm.layers import ConvNormAct
from equivision_timm.models import EquivariantBackbone, EquivariantResNet, EquivariantViT, model_names
from equivision_timm.models.attributes import attribute
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.models.variants import create
from equivision_timm.testing import equivariance_error
from equivision_timm.weights.equivision.rivals import CLEARLY
from equivision_timm.weights.equivision.signs import (
    Z_LIMIT,
    apply_signs,
    best_fit,
    fit_as_it_stands,
    statistics_misfit,
)
from equivision_timm.weights.rooms import released
from equivision_timm.weights.strict_load import Loaded, load_strictly

__all__ = ["Check", "as_json", "as_table", "check_files", "verify"]

_SIZE = 97  # of the images on which equivariance is measured, or the next exact one
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One row: what was checked, whether it held (None: reported only), and the finding."""

    name: str
    ok: bool | None
    finding: str


def verify(target: str, images: str | Path | None = None, data: str | Path | None = None) -> list[Check]:
    """Check a model, as far as it can be loaded.

    Args:
        target: a model folder, a safetensors file, or the name of a model with pretrained weights.
        images: folder of photographs for the batch-norm statistics; None takes those of scikit-image.
        data: labelled images, one sub-folder a class (ImageNet's validation set); None leaves the accuracy out.

    Returns:
        All rows; the model is fine where no `ok` is False.
    """
    checks, loaded = check_files(target)
    if loaded is None or any(check.name == "finite" and check.ok is False for check in checks):
        return checks  # what follows would only repeat it
    checks += [*_equivariance(loaded.model), *_statistics(loaded, images)]
    return [*checks, *_accuracy(loaded.model, data)] if data is not None else checks


def as_table(checks: list[Check]) -> str:
    """The rows as text for people."""
    words = {True: "ok", False: "FAILED", None: "-"}
    width = max(len(check.name) for check in checks)
    return "\n".join(one_line(f"{check.name:{width}}  {words[check.ok]:6}  {check.finding}") for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The rows for machines."""
    return {"ok": all(check.ok is not False for check in checks), "checks": [asdict(check) for check in checks]}


def check_files(target: str) -> tuple[list[Check], Loaded | None]:
    """The rows that need the files alone: does the model load, from what, and are its values possible ones.

    Returns:
        The rows, and the model where it loads.
    """
    try:
        loaded = load_strictly(target)
    except Exception as error:  # of timm, torch, safetensors, the Hub's client, ...: all mean that it does not load
        return [Check("loads", False, f"{type(error).__name__}: {str(error).strip() or target}")], None
    checks = [Check("loads", True, f"{loaded.name}, every entry")]
    return [*checks, *_origin(loaded), *_preprocessing(loaded), *_finite(loaded.state_dict)], loaded


def _origin(loaded: Loaded) -> Iterator[Check]:
    yield Check("sha256", None, file_sha256(loaded.weights))
    provenance, found = dict(loaded.provenance), hash_tensors(loaded.state_dict)
    expected = provenance.pop(TENSORS_SHA256, None)
    if expected is None:
        finding = f"{found}, but the file does not say what it was at first: whether a value changed cannot be told"
        yield Check(TENSORS_SHA256, None, finding)
    else:
        finding = found if found == expected else f"{found}, but it was {expected}: the tensors have been changed"
        yield Check(TENSORS_SHA256, found == expected, finding)
    if not provenance:
        yield Check("provenance", None, "the file does not say where it comes from")
    for key, value in provenance.items():
        wrong = key == "basis_sha256" and not are_bases(value, loaded.model.kernels())
        ours = bases_sha256(loaded.model.kernels()) if wrong else ""
        finding = f"{value}, but the kernel bases of this package are {ours}" if wrong else value
        yield Check(key, not wrong if key == "basis_sha256" else None, finding)


def _preprocessing(loaded: Loaded) -> Iterator[Check]:
    """What is done to an image before the network sees it; for weights of the original it is known."""
    found = resolve_data_config({}, pretrained_cfg=attribute(loaded.model, "pretrained_cfg", dict))
    known = resolve_data_config({}, pretrained_cfg=resolve_pretrained_cfg(loaded.name).to_dict())
    differ = [f"{key} {found[key]}" for key in known if _listed(found[key]) != _listed(known[key])]
    is_original = "source_sha256" in loaded.provenance
    finding = f"{', '.join(differ)}, unlike the original's" if differ else "that of the original"
    yield Check("preprocessing", not differ if is_original else None, finding)


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _finite(state: dict[str, torch.Tensor]) -> Iterator[Check]:
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    bad += [name for name, value in state.items() if name.endswith("running_var") and (value < 0).any()]
    finding = f"NaN, infinity or a negative variance in {', '.join(bad[:3])}" if bad else f"all {len(state)} entries"
    yield Check("finite", not bad, finding)


class _Maps(nn.Module):
    """The maps of a model."""

    def __init__(self, model: EquivariantBackbone | EquivariantViT) -> None:
        super().__init__()
        self.model, self.group, self.in_chans = model, model.group, model.in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


def _equivariance(model: EquivariantBackbone | EquivariantViT) -> Iterator[Check]:
    """Of the logits; of the maps where the classifier reads the group axis, as a published one may."""
    group, (_, size) = Group.from_name(model.group), model.exact_sizes(_SIZE)
    invariant = model.is_invariant
    if not invariant and isinstance(model, EquivariantViT):
        yield Check("equivariance", None, "not checked: neither logits nor last maps of a hybrid are invariant")
        return
    try:
        errors = (
            equivariance_error(model, size)
            if invariant
            else equivariance_error(_Maps(model), size, output_type="regular")
        )
    except ValueError as error:
        yield Check("equivariance", False, str(error))
        return
    worst = max(errors[g] for g in group.grid_elements)
    where = f"of the {'logits' if invariant else 'maps'} at {size} x {size} pixels"
    finding = f"{worst:.1e} {where}, rotations by 90 degrees and reflections in {group.name} (at most {_TOLERANCE:.0e})"
    yield Check("equivariance", worst <= _TOLERANCE, finding)
    others = [errors[g] for g in errors if g not in group.grid_elements]
    if others:
        yield Check("other elements", None, f"{max(others):.1e} {where}, resampled")


def _statistics(loaded: Loaded, images: str | Path | None) -> Iterator[Check]:
    if not isinstance(loaded.model, EquivariantResNet):
        yield Check("statistics", None, f"not checked: they are known of ResNets, not of {type(loaded.model).__name__}")
        return
    try:
        crops = load_crops(images)
    except ModuleNotFoundError as error:
        yield Check("statistics", None, f"not checked: {error}")
        return
    except (OSError, ValueError) as error:
        yield Check("statistics", False, str(error))
        return
    if loaded.model.in_chans != 3:
        yield Check("statistics", None, f"not checked: the model takes {loaded.model.in_chans} channels, photographs 3")
        return
    residuals = statistics_misfit(loaded.model, crops)
    every = torch.cat(list(residuals.values()))
    layer = max(residuals, key=lambda name: residuals[name].square().mean().item())
    rms = every.square().mean().sqrt().item()
    finding = (
        f"log(variance on {len(crops)} crops / running variance): {rms:.2g} rms over "
        f"{len(every)} fields, most in {layer}, {residuals[layer].square().mean().sqrt():.2g}"
    )
    yield Check("statistics", None if every.isfinite().all() else False, finding)
    if every.isfinite().all():
        yield from _rivals(loaded, loaded.model, crops, rms)


def _rivals(loaded: Loaded, model: EquivariantResNet, crops: torch.Tensor, rms: float) -> Iterator[Check]:
    """Is it the model that it is said to be? Those of D_4 and C_8 have the same names and shapes, other statistics."""
    own = fit_as_it_stands(model, crops)
    coefficients = _as_in_the_checkpoint(loaded, model)
    for name in _same_shapes(loaded):
        rival = create(name, EquivariantResNet, num_classes=model.num_classes)
        rival.load_state_dict(coefficients)
        fit = best_fit(rival, crops, descend=False)
        other = torch.cat(fit.residuals).square().mean().sqrt().item()
        wrong = fit.lead(own) >= Z_LIMIT and other <= CLEARLY * rms
        finding = f"{name} has the same names and shapes, and {other:.2g} rms under its best known signs"
        finding += f": it is a checkpoint of {name}, convert it as such" if wrong else ""
        yield Check("other model", False if wrong else None, finding)


def _same_shapes(loaded: Loaded) -> list[str]:
    """The other models of ours that the entries fit."""
    named = re.fullmatch(r"(test_)?[cd]\d+(r.*)", loaded.name)
    if named is None:  # of a family elsewhere
        return []
    prefix, suffix = named.groups("")
    shapes = {name: value.shape for name, value in loaded.state_dict.items()}
    names = []
    for name in fnmatch.filter(model_names(), f"{prefix}[cd]*{suffix}"):
        with torch.device("meta"):
            state = timm.create_model(name, num_classes=loaded.model.num_classes).state_dict()
        if name != loaded.name and {key: value.shape for key, value in state.items()} == shapes:
            names.append(name)
    return names


def _as_in_the_checkpoint(loaded: Loaded, model: EquivariantResNet) -> dict[str, torch.Tensor]:
    """The entries with the signs of the converter undone: what another model would have been converted from."""
    signs = loaded.provenance.get("signs")
    if signs is None:
        return loaded.state_dict
    model = copy.deepcopy(model)
    weights = {name: module.conv.weight for name, module in model.named_modules() if isinstance(module, ConvNormAct)}
    apply_signs(model, {name: weight.detach().clone() for name, weight in weights.items()}, signs)
    return model.state_dict()


def _accuracy(model: EquivariantBackbone | EquivariantViT, data: str | Path) -> Iterator[Check]:
    """Top-1 and top-5; where the original reported a figure, ours must not fall short of it beyond chance."""
    config = resolve_data_config({}, model=model)
    if not Path(data).is_dir():
        yield Check("accuracy", False, f"{data} is no folder of labelled images")
        return
    try:
        dataset = ImageFolder(str(data), "validation")
    except (OSError, RuntimeError, ValueError) as error:
        yield Check("accuracy", False, f"{data}: {error}")
        return
    classes = len(dataset.class_to_idx)
    if classes != model.num_classes:
        yield Check("accuracy", False, f"{data} has {classes} classes, the model {model.num_classes}")
        return
    dataset.transform = preparation(config)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32)
    meters = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for batch, labels in tqdm(loader, desc="accuracy"):
            for meter, value in zip(meters, accuracy(model(batch), labels, topk=(1, 5)), strict=True):
                meter.update(value.item(), len(labels))
    reported = released().get(attribute(model, "pretrained_cfg", dict)["architecture"])
    for name, meter in zip(("top-1", "top-5"), meters, strict=True):
        expected = reported.reported.get(name.replace("-", "")) if reported else None
        finding, ok = f"{meter.avg:.2f} % of {meter.count} images", None
        if expected is not None:
            slack = 1 + 4 * (expected * (1 - expected) / meter.count) ** 0.5 * 100  # a point, and four standard errors
            ok = meter.avg >= 100 * expected - slack
            finding += f", reported {100 * expected:.1f} % (at least {100 * expected - slack:.1f} % expected here)"
        yield Check(name, ok, finding)
