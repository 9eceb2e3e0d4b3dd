"""Model folders, as timm's `local-dir:` and the Hub have them: written all or nothing, and loaded strictly.

A config can ask for another network with the same entries (`model_args`), or leave entries random (a classifier of
another size). `load_strictly` therefore compares the arguments with those of the conversion, and the loaded model with
the file, entry by entry.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf

from equivision_timm.errors import InputError
from equivision_timm.files import check_writable
from equivision_timm.models import model_names
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, find_weights, read_checked

__all__ = ["CONFIG_FILE", "Loaded", "check_model_folder", "load_strictly", "write_model_folder"]

CONFIG_FILE = "config.json"
_ARGUMENTS = "model_args"  # in the config, and in the metadata of the weights


def check_model_folder(folder: str | Path, model_name: str) -> None:
    """Raises InputError if `write_model_folder` could not write here, or would replace something else."""
    config = Path(folder) / CONFIG_FILE
    for path in (config, Path(folder) / WEIGHTS_FILE):
        check_writable(path)
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
        provenance: for the metadata of the safetensors file.
        model_args: arguments of `timm.create_model` that differ from the model's own.

    Raises:
        RuntimeError: the weights do not fit the model.
        InputError: the folder cannot be written or holds something else.
        OSError: writing fails; nothing has changed.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        model = timm.create_model(model_name, **(model_args or {}))
    model.load_state_dict(state_dict, assign=True)
    check_model_folder(folder, model_name)
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        config = Path(partial) / CONFIG_FILE
        save_config_for_hf(model, str(config), model_args=model_args)
        written = json.loads(config.read_text(encoding="utf-8")).get(_ARGUMENTS, {})  # timm adds some
        metadata = {"format": "pt", _ARGUMENTS: json.dumps(written), **provenance}
        save_file(tensors, Path(partial) / WEIGHTS_FILE, metadata=metadata)
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
    model: Any
    weights: Path
    state_dict: dict[str, torch.Tensor]
    provenance: dict[str, str]


def load_strictly(target: str) -> Loaded:
    """Load a model folder, a safetensors file whose metadata name the model, or a pretrained model by its name.

    Raises:
        OSError: there is no such file or folder.
        WeightsError: config, metadata and entries do not make up one model of this package, or are damaged.
    """
    path, name, config = Path(target), target.partition(".")[0], {}
    if path.is_dir():
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        weights, name = path / WEIGHTS_FILE, config["architecture"]
    elif path.is_file():
        weights, name = path, None
    elif name in model_names():
        file = resolve_pretrained_cfg(target).file
        weights = Path(file) if file else find_weights(name)
    else:
        raise FileNotFoundError(f"{target!r} is not a file, a folder or a model of this package, e.g. c8resnet50")
    state_dict, provenance = read_checked(weights, name)
    name = name or provenance.get("model", "")
    if name not in model_names():
        raise WeightsError(f"{weights} should hold a model of this package, not {name!r}")
    converted = json.loads(provenance.get(_ARGUMENTS, "{}"))
    if path.is_dir():
        arguments = config.get(_ARGUMENTS, {})
        if _ARGUMENTS in provenance and arguments != converted:
            raise WeightsError(f"{path} has the {_ARGUMENTS} {arguments}, unlike {converted} of its conversion")
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        model = timm.create_model(name, **converted)
        model.load_state_dict(state_dict)
    entries = model.state_dict()
    for key in {**entries, **state_dict}:  # timm leaves a classifier of another size out
        found, held = entries.get(key), state_dict.get(key)
        if found is None or held is None or not torch.equal(found.to(held.dtype), held):
            raise WeightsError(f"{weights} does not fit {name}: {key} is missing, or of another shape or value")
    return Loaded(name, model.eval(), weights, state_dict, provenance)
