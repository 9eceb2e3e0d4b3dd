"""Model folders, as timm's `local-dir:` and the Hub have them: written all or nothing, and loaded strictly.

A config can ask for another network with the same entries (`model_args`), or leave entries random (a classifier of
another size). `load_strictly` therefore compares the arguments with those of the conversion, and every entry.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
    """Raises InputError if `write_model_folder` could not write here, or would replace another model."""
    config = Path(folder) / CONFIG_FILE
    for path in (config, Path(folder) / WEIGHTS_FILE):
        check_writable(path)
    if config.exists() and f'"{model_name}"' not in config.read_text(encoding="utf-8"):
        raise InputError(f"{config} is not of {model_name}, which would replace it: name another folder")


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
        state_dict: exactly the entries of this model.
        provenance: for the metadata of the safetensors file.
        model_args: arguments of `timm.create_model` that differ from the model's own.

    Raises:
        RuntimeError: the weights do not fit the model.
        InputError: the folder cannot be written or holds another model.
        OSError: writing fails; nothing has changed.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        model = timm.create_model(model_name, **(model_args or {}))
    model.load_state_dict(state_dict, assign=True)
    check_model_folder(folder, model_name)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        config = Path(partial) / CONFIG_FILE
        save_config_for_hf(model, str(config), model_args=model_args)
        written = json.loads(config.read_text(encoding="utf-8")).get(_ARGUMENTS, {})  # timm adds some
        metadata = {"format": "pt", _ARGUMENTS: json.dumps(written), **provenance}
        save_file(state_dict, Path(partial) / WEIGHTS_FILE, metadata=metadata)
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # the config of a model is always the same, so any order will do
            os.replace(Path(partial) / name, folder / name)
    return folder


class Loaded(NamedTuple):
    """A model and its file."""

    name: str  # architecture, e.g. 'c8resnet50'
    model: Any  # in eval mode
    weights: Path
    provenance: dict[str, str]  # the metadata of the file


def load_strictly(target: str) -> Loaded:
    """Load a model folder, a safetensors file whose metadata name the model, or a pretrained model by its name.

    Raises:
        OSError: there is no such file or folder.
        WeightsError: config, metadata and entries do not make up one model of this package, or are damaged.
    """
    path, name, config = Path(target), target.partition(".")[0], {}
    if path.is_file():
        weights, name = path, None
    elif name in model_names() and not path.is_dir():
        file = resolve_pretrained_cfg(target).file
        weights = Path(file) if file else find_weights(name)
    elif not (path / CONFIG_FILE).is_file():
        raise InputError(f"{target} is not a file, a model folder, or a model such as c8resnet50: name another")
    else:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        weights, name = path / WEIGHTS_FILE, config["architecture"]
    state_dict, provenance = read_checked(weights, name)
    name = name or provenance.get("model", "")
    if name not in model_names():
        raise WeightsError(f"{weights} should hold a model of this package, not {name!r}")
    converted = json.loads(provenance.get(_ARGUMENTS, "{}"))
    if config:
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
    return Loaded(name, model.eval(), weights, provenance)
