"""Checks of weights that are about to be used or published, one row each."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import resolve_pretrained_cfg
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from equivision_timm.data import ImageFolder, load_crops, preparation
from equivision_timm.errors import one_line
from equivision_timm.files import file_sha256
from equivision_timm.groups import Group
from equivision_timm.models import EquivariantResNet, EquivariantViT
from equivision_timm.models.pretrained import impossible_entries
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.testing import equivariance_error
from equivision_timm.weights.folder import Adapted, Loaded, Model, load_strictly
from equivision_timm.weights.released import released
from equivision_timm.weights.statistics import fit

__all__ = ["Check", "as_json", "as_table", "check_files", "verify"]

_SIZE = 97  # of the images on which equivariance is measured, or the next exact one
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One row: name, result (None: reported only), finding."""

    name: str
    ok: bool | None
    finding: str


def verify(target: str, images: str | Path | None = None, data: str | Path | None = None) -> list[Check]:
    """Check a model.

    Args:
        target: a model folder, a safetensors file, or the name of a model with pretrained weights.
        images: folder of photographs for the batch-norm statistics, by default those of scikit-image.
        data: labelled images, one sub-folder a class, such as ImageNet's validation set; None skips the accuracy.

    Returns:
        All rows; the model passes if no `ok` is False.
    """
    checks, loaded = check_files(target)
    if loaded is None or any(check.name == "finite" and check.ok is False for check in checks):
        return checks
    checks += [*_equivariance(loaded.model), *_statistics(loaded, images)]
    return [*checks, *_accuracy(loaded.model, data)] if data is not None else checks


def as_table(checks: list[Check]) -> str:
    """The rows as text."""
    words = {True: "ok", False: "FAILED", None: "-"}
    width = max(len(check.name) for check in checks)
    return "\n".join(one_line(f"{check.name:{width}}  {words[check.ok]:6}  {check.finding}") for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The rows as JSON."""
    return {"ok": all(check.ok is not False for check in checks), "checks": [asdict(check) for check in checks]}


def check_files(target: str) -> tuple[list[Check], Loaded | None]:
    """Rows that only need the files, and the model if it loads."""
    try:
        loaded = load_strictly(target)
    except Exception as error:  # of timm, torch, safetensors, huggingface_hub, json
        return [Check("loads", False, f"{type(error).__name__}: {str(error).strip() or target}")], None
    checks = [Check("loads", True, f"{loaded.name}, every entry")]
    return [*checks, *_origin(loaded), *_preprocessing(loaded), *_finite(loaded.state_dict)], loaded


def _origin(loaded: Loaded) -> Iterator[Check]:
    yield Check("sha256", None, file_sha256(loaded.weights))
    provenance, found = dict(loaded.provenance), hash_tensors(loaded.state_dict)
    expected = provenance.pop(TENSORS_SHA256, None)
    if expected is None:
        yield Check(TENSORS_SHA256, None, f"{found}; the file holds none to compare with")
    else:
        finding = found if found == expected else f"{found}, but it was {expected}: the tensors have been changed"
        yield Check(TENSORS_SHA256, found == expected, finding)
    for key, value in (provenance or {"provenance": "none in the file"}).items():
        yield Check(key, None, value)


def _preprocessing(loaded: Loaded) -> Iterator[Check]:
    """Preprocessing in the config; that of converted weights is known."""
    found = resolve_data_config({}, model=loaded.model)
    known = resolve_data_config({}, pretrained_cfg=resolve_pretrained_cfg(loaded.name).to_dict())
    differ = [f"{key} {found[key]}" for key in known if json.dumps(found[key]) != json.dumps(known[key])]
    is_converted = "source_sha256" in loaded.provenance
    finding = f"{', '.join(differ)}, unlike that of the architecture" if differ else "that of the architecture"
    yield Check("preprocessing", not differ if is_converted else None, finding)


def _finite(state: dict[str, torch.Tensor]) -> Iterator[Check]:
    bad = impossible_entries(state)
    finding = f"NaN, infinity or a negative variance in {', '.join(bad[:3])}" if bad else f"all {len(state)} entries"
    yield Check("finite", not bad, finding)


class _Maps(nn.Module):
    """`forward_features` of a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.group, self.in_chans = model, model.group, model.in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


def _equivariance(model: Model | Adapted) -> Iterator[Check]:
    """Of the logits, or of the maps if the classifier reads the group axis."""
    group = Group.from_name(model.group)
    if isinstance(model, Adapted):
        if not model.has_head or getattr(model, "gate", 0.0) > 0:
            yield Check("equivariance", None, "not checked: of an adapted model only with a head and without a gate")
            return
        cfg: Any = model.pretrained_cfg
        invariant, size = True, cfg["input_size"][-1]
    else:
        invariant, (_, size) = model.is_invariant, model.exact_sizes(_SIZE)
    if not invariant and isinstance(model, EquivariantViT):
        yield Check("equivariance", None, "not checked: neither logits nor last maps of a hybrid are invariant")
        return
    try:
        if invariant:
            errors = equivariance_error(model, size)
        else:
            errors = equivariance_error(_Maps(cast(Model, model)), size, output_type="regular")
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
    """Running variances against those on photographs."""
    model = loaded.model
    if not isinstance(model, EquivariantResNet) or model.in_chans != 3:
        yield Check("statistics", None, "not checked: known for ResNets of RGB images only")
        return
    try:
        crops = load_crops(images)
    except ModuleNotFoundError as error:
        yield Check("statistics", None, f"not checked: {error}")
        return
    except (OSError, ValueError) as error:
        yield Check("statistics", False, str(error))
        return
    own = fit(model, crops)
    layer = max(own.residuals, key=lambda name: own.residuals[name].square().mean().item())
    finding = (
        f"log(variance on {len(crops)} crops / running variance): {own.rms:.2g} rms, most in {layer}, "
        f"{own.residuals[layer].square().mean().sqrt():.2g}"
    )
    yield Check("statistics", None if own.is_finite else False, finding)


def _accuracy(model: Model | Adapted, data: str | Path) -> Iterator[Check]:
    """Top-1 and top-5, at least the reported figures less a margin."""
    try:
        dataset = ImageFolder(str(data), "validation")
    except (OSError, RuntimeError, ValueError) as error:
        yield Check("accuracy", False, f"{data}: {error}")
        return
    classes = len(dataset.class_to_idx)
    if classes != model.num_classes:
        yield Check("accuracy", False, f"{data} has {classes} classes, the model {model.num_classes}")
        return
    dataset.transform = preparation(resolve_data_config({}, model=model))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32)
    meters = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for batch, labels in tqdm(loader, desc="accuracy"):
            for meter, value in zip(meters, accuracy(model(batch), labels, topk=(1, 5)), strict=True):
                meter.update(value.item(), len(labels))
    reported = released().get(model.pretrained_cfg["architecture"])  # type: ignore[index,arg-type]
    for name, meter in zip(("top-1", "top-5"), meters, strict=True):
        expected = reported.reported.get(name.replace("-", "")) if reported else None
        finding, ok = f"{meter.avg:.2f} % of {meter.count} images", None
        if expected is not None:
            slack = 1 + 4 * (expected * (1 - expected) / meter.count) ** 0.5 * 100  # a point, and four standard errors
            ok = meter.avg >= 100 * expected - slack
            finding += f", reported {100 * expected:.1f} % (at least {100 * expected - slack:.1f} % expected here)"
        yield Check(name, ok, finding)
