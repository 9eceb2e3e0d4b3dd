"""Model folders, as timm's `local-dir:` and the Hub have them: written all or nothing, and loaded strictly.

A config can ask for another network with the same entries (`model_args`) or leave entries random (a classifier of
another size). `load_strictly` therefore allows only arguments that leave the logits unchanged, and compares the loaded
model with the file, entry by entry.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import timm
import torch
from safetensors.torch import save_file
from timm.models import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf

from equivision_timm.errors import InputError
from equivision_timm.files import check_writable
from equivision_timm.models import (
    Canonicalized,
    EquivariantBackbone,
    EquivariantConvNeXt,
    EquivariantViT,
    Symmetrized,
    model_names,
)
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, find_weights, read_safetensors
from equivision_timm.models.variants import create
from equivision_timm.weights.checkpoint import read_checkpoint

__all__ = [
    "CONFIG_FILE",
    "Adapted",
    "Loaded",
    "Model",
    "check_model_folder",
    "create_ours",
    "load_strictly",
    "write_model_folder",
]

CONFIG_FILE = "config.json"
# Arguments that leave the logits unchanged, or follow from the shapes of the entries
_HARMLESS = ("num_classes", "in_chans", "invariants", "drop_rate", "drop_path_rate", "bn_momentum", "zero_init_last")
_HARMLESS += ("conv_strategy",)

Model = EquivariantBackbone | EquivariantConvNeXt | EquivariantViT
Adapted = Symmetrized | Canonicalized

_LOADED: tuple[type[Any], ...] = get_args(Model) + get_args(Adapted)
_PICKLE_FILE = "pytorch_model.bin"  # of save_for_hf without safe_serialization=True


def create_ours(model_name: str, **keywords: Any) -> Model:
    """`timm.create_model` for a model of this package."""
    return create(model_name, EquivariantBackbone, EquivariantConvNeXt, EquivariantViT, **keywords)


def check_model_folder(folder: str | Path, model_name: str) -> None:
    """Raises InputError if `write_model_folder` could not write here, or would replace something else."""
    config = Path(folder) / CONFIG_FILE
    for path in (config, Path(folder) / WEIGHTS_FILE):
        check_writable(path, make_folders=True)
    if config.exists():
        try:
            held = json.loads(config.read_text(encoding="utf-8"))["architecture"]
        except (ValueError, KeyError, TypeError):
            held = "something else"
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

    Raises:
        WeightsError: the weights do not fit the model.
        InputError: the folder cannot be written or holds something else.
        OSError: writing fails; nothing has changed.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        model = timm.create_model(model_name, **(model_args or {}))
    try:
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"these weights do not fit {model_name}: {' '.join(str(error).split())[:500]}") from error
    check_model_folder(folder, model_name)
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        save_config_for_hf(model, str(Path(partial) / CONFIG_FILE), model_args=model_args)
        save_file(tensors, Path(partial) / WEIGHTS_FILE, metadata={"format": "pt", **provenance})
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # the config of a model is always the same, so any order will do
            os.replace(Path(partial) / name, folder / name)
    return folder


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
    model: Model | Adapted
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
        weights, name = path / WEIGHTS_FILE, _read_architecture(path / CONFIG_FILE)
        if not weights.exists() and (path / _PICKLE_FILE).exists():
            weights = path / _PICKLE_FILE
    elif path.is_file():
        weights, name = path, ""
    elif name in model_names():
        file = resolve_pretrained_cfg(target).file
        weights = Path(file) if file else find_weights(name)
    else:
        raise FileNotFoundError(f"{target!r} is not a file, a folder or a model of this package, e.g. c8resnet50")
    if weights.name == _PICKLE_FILE:
        state_dict, provenance = read_checkpoint(weights), {}
    else:
        state_dict, provenance = read_safetensors(weights)
    held = provenance.get("model", name)
    if held not in model_names() or held != (name or held):
        raise WeightsError(f"{weights} should hold {name or 'a model of this package'}, its metadata name {held!r}")
    model: Any = create(f"local-dir:{path}" if path.is_dir() else held, *_LOADED, pretrained=path.is_dir())
    if not path.is_dir():
        model.load_state_dict(state_dict)
    entries = model.state_dict()
    for key in {**entries, **state_dict}:  # timm leaves a classifier of another size out
        a, b = entries.get(key), state_dict.get(key)
        fits = (
            a is not None
            and b is not None
            and a.shape == b.shape
            and a.is_floating_point() == b.is_floating_point()
            and torch.allclose(a.to(b.dtype), b, rtol=0, atol=0, equal_nan=True)
        )
        if not fits:
            raise WeightsError(f"{weights} does not fit {held}: {key} is missing, or of another shape, dtype or value")
    return Loaded(held, model.eval(), weights, state_dict, provenance)


def _read_architecture(path: Path) -> str:
    """The architecture in a config; raises WeightsError if the other fields make another network."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name, cfg, arguments = config["architecture"], config["pretrained_cfg"], config.get("model_args", {})
    if name not in model_names():
        raise WeightsError(f"{path} names {name!r}, which is not a model of this package")
    model: Any = create(name, *_LOADED, device="meta")
    own: dict[str, Any] = {"global_pool": "avg"}  # timm writes these in any case
    if isinstance(model, EquivariantViT):
        own = {"global_pool": model.global_pool, "img_size": list(model.patch_embed.img_size)}
    other = {key: value for key, value in arguments.items() if key not in _HARMLESS and value != own.get(key, ...)}
    if isinstance(model, Adapted):
        other = {}  # the backbone and the group are arguments
    classes = {part["num_classes"] for part in (config, cfg, arguments) if part.get("num_classes") is not None}
    channels = {cfg.get("input_size", [3])[0], arguments.get("in_chans", 3)}
    if other or len(classes) > 1 or len(channels) > 1:
        raise WeightsError(
            f"{path} makes another network than {name}: by the model_args {other}, or by num_classes {classes} or "
            f"channels {channels}, of which there should be one"
        )
    return name
