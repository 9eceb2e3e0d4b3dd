"""Model folders, as timm's `local-dir:` and the Hub have them: written all or nothing, and loaded strictly.

A config can ask for another network with the same entries (`model_args`) or leave entries random (a classifier of
another size). `load_strictly` therefore allows only arguments that leave the logits unchanged, and compares the loaded
model with the file, entry by entry.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import resolve_pretrained_cfg
from timm.models._hub import HF_WEIGHTS_NAME, save_config_for_hf

from equivision_timm.errors import InputError
from equivision_timm.files import check_writable
from equivision_timm.models import EquivariantBackbone, EquivariantConvNeXt, EquivariantViT, model_names
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, find_weights
from equivision_timm.models.variants import create

__all__ = [
    "CONFIG_FILE",
    "Loaded",
    "check_model_folder",
    "load_strictly",
    "read_provenance",
    "versions",
    "write_config",
    "write_model_folder",
]

CONFIG_FILE = "config.json"
# Arguments that leave the logits unchanged, or follow from the shapes of the entries
_HARMLESS = ("num_classes", "in_chans", "invariants", "drop_rate", "drop_path_rate", "bn_momentum", "zero_init_last")
_HARMLESS += ("conv_strategy",)


def check_model_folder(folder: str | Path, model_name: str) -> None:
    """Raises InputError if `write_model_folder` could not write here, or would replace something else."""
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for the converted model")
    for path in (folder.with_name(f".{folder.name}.partial-12345678"), folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        check_writable(path, make_folders=True)
    config = folder / CONFIG_FILE
    if not config.exists():
        return
    try:
        held = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} belongs to something else: name another folder") from error
    if held != model_name:
        raise InputError(f"{folder} holds {held}, and {model_name} would replace it: name another folder")


def write_model_folder(
    folder: str | Path,
    model_name: str,
    state_dict: dict[str, torch.Tensor],
    provenance: dict[str, str],
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json`, or leave the folder as it is.

    Args:
        folder: created if missing; its other files are kept.
        model_name: e.g. 'c8resnet50'.
        state_dict: exactly the entries of this model.
        provenance: origin of the weights, for the metadata of the safetensors file.
        model_args: arguments of `timm.create_model` that differ from the model's own.

    Returns:
        The folder.

    Raises:
        WeightsError: the weights do not fit the model.
        InputError: the folder cannot be written or holds something else.
        OSError: writing fails; nothing has changed.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        model = timm.create_model(model_name, **(model_args or {}))
    try:
        model.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"these weights do not fit {model_name}: {' '.join(str(error).split())[:500]}") from error
    check_model_folder(folder, model_name)
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        write_config(model, staging / CONFIG_FILE, model_args)
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt", **provenance})
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with (staging / name).open("rb") as file:
                os.fsync(file.fileno())
        folder.mkdir(exist_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # the config of a model is always the same, so any order will do
            os.replace(staging / name, folder / name)
    except SafetensorError as error:  # of the file system
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def write_config(model: torch.nn.Module, path: Path, model_args: dict[str, Any] | None = None) -> None:
    """Write timm's `config.json` of a model, with the arguments that it was made with."""
    config_path: Any = path  # old versions of timm need a Path; new ones declare a str
    save_config_for_hf(model, config_path, model_args=model_args)


def read_provenance(path: str | Path) -> dict[str, str]:
    """Provenance in the metadata of a safetensors file, or of the one in a model folder.

    Raises:
        OSError: there is no such file.
        WeightsError: it is damaged or not a safetensors file.
    """
    path = Path(path)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error
    return {key: metadata[key] for key in sorted(metadata) if key != "format"}


def versions() -> dict[str, str]:
    """Versions of the packages that convert, and the date, for the provenance."""
    names = ("equivision-timm", "timm", "torch", "safetensors")
    return {**{name: version(name) for name in names}, "date": datetime.now(timezone.utc).date().isoformat()}


@dataclass(frozen=True)
class Loaded:
    """A model and its file.

    Attributes:
        name: architecture, e.g. 'c8resnet50'.
        model: the network, in eval mode.
        weights: the file.
        state_dict: the entries of the file.
        provenance: origin of the weights, if the file has metadata.
    """

    name: str
    model: EquivariantBackbone | EquivariantConvNeXt | EquivariantViT
    weights: Path
    state_dict: dict[str, torch.Tensor]
    provenance: dict[str, str]


def load_strictly(target: str) -> Loaded:
    """Load a model folder, a safetensors file whose metadata name the model, or a pretrained model by its name.

    Raises:
        OSError: there is no such file or folder.
        WeightsError: config, metadata and entries do not make up one model of this package.
    """
    path, name = Path(target), target.partition(".")[0]
    if path.is_dir():
        files = [path / name for name in (WEIGHTS_FILE, HF_WEIGHTS_NAME) if (path / name).is_file()]
        if not files or not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path} is not a model folder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}")
        weights, name = files[0], _read_architecture(path / CONFIG_FILE)
    elif path.is_file():
        weights, name = path, read_provenance(path).get("model", "")
    elif name in model_names():
        file = resolve_pretrained_cfg(target).file
        weights = Path(file) if file else find_weights(name)
    else:
        raise FileNotFoundError(f"{target!r} is not a file, a folder or a model of this package, e.g. c8resnet50")
    is_safe = weights.suffix == ".safetensors"
    provenance = read_provenance(weights) if is_safe else {}
    if name not in model_names() or provenance.get("model", name) != name:
        raise WeightsError(f"{weights} should hold {name!r}, its metadata name {provenance.get('model')!r}")
    state_dict = load_file(weights) if is_safe else torch.load(weights, map_location="cpu", weights_only=True)
    if path.is_dir():
        model = create(f"local-dir:{path}", EquivariantBackbone, EquivariantConvNeXt, EquivariantViT, pretrained=True)
    else:
        model = create(name, EquivariantBackbone, EquivariantConvNeXt, EquivariantViT)
        model.load_state_dict(state_dict)
    entries = model.state_dict()
    for key in {**entries, **state_dict}:  # timm leaves a classifier of another size out
        a, b = entries.get(key), state_dict.get(key)
        if a is None or b is None or a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            raise WeightsError(f"{weights} does not fit {name}: {key} is missing, or of another shape or dtype")
        if not torch.allclose(a.to(b.dtype), b, rtol=0, atol=0, equal_nan=True):
            raise WeightsError(f"the model is not what {weights} holds: {key} differs")
    return Loaded(name, model.eval(), weights, state_dict, provenance)


def _read_architecture(path: Path) -> str:
    """The architecture in a config; raises WeightsError if the other fields make another network."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name, cfg = config["architecture"], config["pretrained_cfg"]
    if name not in model_names():
        raise WeightsError(f"{path} names {name!r}, which is not a model of this package")
    with torch.device("meta"):
        model = create(name, EquivariantBackbone, EquivariantConvNeXt, EquivariantViT)
    own: dict[str, Any] = {"global_pool": "avg"}  # timm writes these in any case
    if isinstance(model, EquivariantViT):
        own = {"global_pool": model.global_pool, "img_size": list(model.patch_embed.img_size)}
    arguments = config.get("model_args", {})
    other = {key: value for key, value in arguments.items() if key not in _HARMLESS and value != own.get(key, ...)}
    if other:
        raise WeightsError(f"{path} makes another network than {name}, by the model_args {other}")
    classes = {part["num_classes"] for part in (config, cfg, arguments) if part.get("num_classes") is not None}
    channels = {cfg.get("input_size", [3])[0], arguments.get("in_chans", 3)}
    if len(classes) > 1 or len(channels) > 1:
        raise WeightsError(f"{path} gives {classes} as num_classes, {channels} as channels: one number is needed")
    return name
