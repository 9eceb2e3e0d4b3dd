"""Is a model what it claims to be? Checks of weights that are about to be used or published, one row each."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from equivision_timm.checkpoints.folder import CONFIG_FILE, read_provenance
from equivision_timm.checkpoints.photographs import load_crops
from equivision_timm.checkpoints.released import released
from equivision_timm.checkpoints.signs import statistics_misfit
from equivision_timm.groups import Group
from equivision_timm.kernel_bases import manifest
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import WEIGHTS_FILE
from equivision_timm.testing import equivariance_error

__all__ = ["Check", "as_json", "as_table", "verify"]

_EXACT_SIZE = 97  # n = 1 mod 32: quarter turns and mirrors are exact
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
    try:
        model, weights = _load(target)
    except Exception as error:  # of timm, torch, safetensors, the Hub's client, ...: all mean that it does not load
        return [Check("loads", False, f"{type(error).__name__}: {str(error).strip() or target}")]
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _origin(weights),
        lambda: _finite(model),
        lambda: _equivariance(model),
        lambda: _statistics(model, images),
    ]
    if data is not None:
        steps.append(lambda: _accuracy(model, data))
    checks = [Check("loads", True, f"{model.pretrained_cfg['architecture']}, every entry")]
    for step in steps:
        if any(check.name == "finite" and check.ok is False for check in checks):
            break  # what follows would only repeat it
        checks.extend(step())
    return checks


def as_table(checks: list[Check]) -> str:
    """The rows as text for people."""
    words = {True: "ok", False: "FAILED", None: "-"}
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{check.name:{width}}  {words[check.ok]:6}  {check.finding}" for check in checks)


def as_json(checks: list[Check]) -> dict:
    """The rows for machines."""
    return {"ok": all(check.ok is not False for check in checks), "checks": [asdict(check) for check in checks]}


def _load(target: str) -> tuple[EquivariantResNet, Path | None]:
    """The model in eval mode, loaded strictly, and its weights file; None where the Hub's cache holds it."""
    path = Path(target)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file() or not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path} is no model folder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}")
        model, weights = timm.create_model(f"local-dir:{path}", pretrained=True), path / WEIGHTS_FILE
    elif path.is_file():
        name = read_provenance(path).get("model")
        if name is None:
            raise ValueError(f"{path} does not say which model it is for: verify its folder, with {CONFIG_FILE}")
        model, weights = timm.create_model(name), path
        model.load_state_dict(load_file(path))
    elif os.sep in target or path.suffix:
        raise FileNotFoundError(f"there is no file or folder {target}")
    else:
        model, weights = timm.create_model(target, pretrained=True), None
    if not isinstance(model, EquivariantResNet):
        raise ValueError(f"{target} is a {type(model).__name__}, not one of our models")
    return model.eval(), weights


def _origin(weights: Path | None) -> Iterator[Check]:
    if weights is None:
        yield Check("origin", None, "the local weights folder or the Hub: verify the folder for hash and provenance")
        return
    yield Check("sha256", None, hashlib.sha256(weights.read_bytes()).hexdigest())
    provenance = read_provenance(weights)
    if not provenance:
        yield Check("provenance", None, "the file does not say where it comes from")
    for key, value in provenance.items():
        wrong = key == "basis_sha256" and value != manifest()["sha256"]
        finding = f"{value}, but the kernel bases of this package are {manifest()['sha256']}" if wrong else value
        yield Check(key, not wrong if key == "basis_sha256" else None, finding)


def _finite(model: EquivariantResNet) -> Iterator[Check]:
    state = model.state_dict()
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    bad += [name for name, value in state.items() if name.endswith("running_var") and (value < 0).any()]
    finding = f"NaN, infinity or a negative variance in {', '.join(bad[:3])}" if bad else f"all {len(state)} entries"
    yield Check("finite", not bad, finding)


def _equivariance(model: EquivariantResNet) -> Iterator[Check]:
    group = Group.from_name(model.group)
    try:
        errors = equivariance_error(model, _EXACT_SIZE)
    except ValueError as error:
        yield Check("equivariance", False, str(error))
        return
    worst = max(errors[g] for g in group.grid_elements)
    where = f"of the logits at {_EXACT_SIZE} x {_EXACT_SIZE} pixels"
    finding = f"{worst:.1e} {where}, quarter turns and mirrors in {group.name} (at most {_TOLERANCE:.0e})"
    yield Check("equivariance", worst <= _TOLERANCE, finding)
    others = [errors[g] for g in errors if g not in group.grid_elements]
    if others:
        yield Check("other elements", None, f"{max(others):.1e} {where}, resampled")


def _statistics(model: EquivariantResNet, images: str | Path | None) -> Iterator[Check]:
    try:
        crops = load_crops(images)
    except ModuleNotFoundError as error:
        yield Check("statistics", None, f"not checked: {error}")
        return
    except (OSError, ValueError) as error:
        yield Check("statistics", False, str(error))
        return
    residuals = statistics_misfit(model, crops)
    every = torch.cat(list(residuals.values()))
    layer = max(residuals, key=lambda name: residuals[name].square().mean().item())
    finding = (
        f"log(variance on {len(crops)} crops / running variance): {every.square().mean().sqrt():.2g} rms over "
        f"{len(every)} fields, most in {layer}, {residuals[layer].square().mean().sqrt():.2g}"
    )
    yield Check("statistics", None if every.isfinite().all() else False, finding)


def _accuracy(model: EquivariantResNet, data: str | Path) -> Iterator[Check]:
    """Top-1 and top-5; where the original reported a figure, ours must not fall short of it beyond chance."""
    config = resolve_data_config({}, model=model)
    if not Path(data).is_dir():
        yield Check("accuracy", False, f"{data} is no folder of labelled images")
        return
    try:
        dataset = create_dataset("", root=str(data), split="validation")
    except (OSError, RuntimeError, ValueError) as error:
        yield Check("accuracy", False, f"{data}: {error}")
        return
    classes = len(getattr(dataset.reader, "class_to_idx", ()))
    if classes != model.num_classes:
        yield Check("accuracy", False, f"{data} has {classes} classes, the model {model.num_classes}")
        return
    loader = create_loader(dataset, **_loader_options(config))
    meters = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for batch, labels in tqdm(loader, desc="accuracy"):
            for meter, value in zip(meters, accuracy(model(batch), labels, topk=(1, 5)), strict=True):
                meter.update(value.item(), len(labels))
    reported = released().get(model.pretrained_cfg["architecture"])
    for name, meter, expected in zip(
        ("top-1", "top-5"), meters, (reported.top1, reported.top5) if reported else (None, None), strict=True
    ):
        finding, ok = f"{meter.avg:.2f} % of {meter.count} images", None
        if expected is not None:
            slack = 1 + 4 * (expected * (1 - expected) / meter.count) ** 0.5 * 100  # a point, and four standard errors
            ok = meter.avg >= 100 * expected - slack
            finding += f", reported {100 * expected:.1f} % (at least {100 * expected - slack:.1f} % expected here)"
        yield Check(name, ok, finding)


def _loader_options(config: dict) -> dict:
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return {
        **{key: config[key] for key in keys},
        "batch_size": 32,
        "num_workers": 0,
        "use_prefetcher": False,
        "device": torch.device("cpu"),
    }
