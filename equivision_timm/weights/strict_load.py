"""Load a model folder, a file or a name so that the network is the one that its architecture names, or refuse.

A `config.json` can ask for another network with the same entries (its `model_args`), and for entries that stay random
(`pretrained_strict`). So: only settings that leave the logits alone are allowed, names and shapes are compared before
anything is built, and what timm makes of a folder is compared with the file, entry by entry, and with the network of
that name, by its logits. Nothing but published weights is ever downloaded.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import resolve_pretrained_cfg

from equivision_timm.models import EquivariantBackbone, EquivariantViT, family_of, model_names
from equivision_timm.models.pretrained import WEIGHTS_FILE, find_weights
from equivision_timm.models.variants import create
from equivision_timm.weights.folder import CONFIG_FILE, read_provenance

__all__ = ["Loaded", "load_strictly"]

# Settings that leave the logits alone; `num_classes` and `in_chans` must be what the entries say
_HARMLESS = ("num_classes", "in_chans", "drop_rate", "drop_path_rate", "bn_momentum", "zero_init_last", "conv_strategy")
_TOLERANCE = 1e-4  # of logits, relative to the largest; float noise is 1e-6


@dataclass(frozen=True)
class Loaded:
    """A model and where it comes from.

    Attributes:
        name: its architecture, e.g. 'c8resnet50'.
        model: the network, in eval mode; of a folder, as timm builds it.
        weights: its safetensors file.
        state_dict: the entries of this file.
        provenance: what the file says of its origin.
    """

    name: str
    model: EquivariantBackbone | EquivariantViT
    weights: Path
    state_dict: dict[str, torch.Tensor]
    provenance: dict[str, str]


def load_strictly(target: str) -> Loaded:
    """Load a model folder, a safetensors file that says which model it is for, or a pretrained model by its name.

    Raises:
        OSError: there is no such file or folder.
        ValueError: the config, the metadata and the entries do not make up one model of ours.
        RuntimeError: a name whose weights are nowhere, or damaged.
    """
    path, architecture, sizes = Path(target), target.partition(".")[0], {}
    if path.is_dir():
        weights = path / WEIGHTS_FILE
        if not weights.is_file() or not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path} is no model folder: it needs {CONFIG_FILE} and {WEIGHTS_FILE}")
        name, sizes = _read_config(path / CONFIG_FILE)
    elif path.is_file():
        name, weights = _check_name(read_provenance(path).get("model"), path), path
    elif architecture in model_names():
        name, weights = architecture, _weights_of(target)
    elif os.sep in target or path.suffix:
        raise FileNotFoundError(f"there is no file or folder {target}")
    else:
        raise ValueError(f"{target!r} is no file, no folder and no model of this package, e.g. c8resnet50")
    provenance = read_provenance(weights)
    if provenance.get("model", name) != name:
        raise ValueError(f"{weights} should hold {name}, but its metadata say that it is for {provenance['model']!r}")
    _check_shapes(weights, name, sizes)
    model = create(name, EquivariantBackbone, EquivariantViT, **sizes).eval()
    loaded = Loaded(name, model, weights, load_file(weights), provenance)
    model.load_state_dict(loaded.state_dict)
    _check_entries(model, loaded)
    return replace(loaded, model=_as_timm_builds_it(path, loaded)) if path.is_dir() else loaded


def _check_name(name: object, path: Path) -> str:
    if name is None:
        raise ValueError(f"{path} does not say which model it is for: verify its folder, with {CONFIG_FILE}")
    if not isinstance(name, str) or name not in model_names():
        raise ValueError(f"{path} says that it is for {name!r}, which is not one of our models")
    return name


def _own_settings(name: str) -> dict[str, object]:
    """What the model is without `model_args`, where timm writes it into a config all the same."""
    with torch.device("meta"):
        model = create(name, EquivariantBackbone, EquivariantViT)
    if isinstance(model, EquivariantViT):
        return {"global_pool": model.global_pool, "img_size": list(model.patch_embed.img_size)}
    return {"global_pool": "avg"}


def _weights_of(name: str) -> Path:
    """The weights that `create_model(name, pretrained=True)` loads."""
    cfg = resolve_pretrained_cfg(name)
    if cfg.file:
        return Path(cfg.file)
    if cfg.hf_hub_filename == WEIGHTS_FILE:
        return find_weights(name.partition(".")[0])
    raise ValueError(f"{name} has no pretrained weights: name a model folder or a safetensors file")


def _read_config(path: Path) -> tuple[str, dict[str, int]]:
    """The architecture that a config names, and its number of classes and of image channels, where it gives them."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    keys = ("model_args", "pretrained_cfg")
    parts = [config, *(config.get(key, {}) for key in keys)] if isinstance(config, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is no config of timm: convert or save the model again")
    config, args, data = parts
    name = _check_name(config.get("architecture"), path)
    own = _own_settings(name)
    other = {key: value for key, value in args.items() if key not in _HARMLESS and value != own.get(key, ...)}
    if other:
        raise ValueError(
            f"{path} makes another network of {name}, by the model_args {other}: only {_HARMLESS} may be set"
        )
    shape = data.get("input_size", config.get("input_size"))
    if shape is not None and not (isinstance(shape, list) and len(shape) == 3):
        raise ValueError(f"{path} gives input_size {shape!r}, where three numbers are needed")
    sizes = {
        "num_classes": [part.get("num_classes") for part in parts],
        "in_chans": [args.get("in_chans"), shape and shape[0]],
    }
    given = {key: [value for value in values if value is not None] for key, values in sizes.items()}
    for key, values in given.items():
        if any(type(value) is not int or value < 0 or value != values[0] for value in values):
            raise ValueError(f"{path} gives {values} as {key}: one number is needed")
    return name, {key: values[0] for key, values in given.items() if values}


def _check_shapes(weights: Path, name: str, sizes: dict[str, int]) -> None:
    """Compare the names and shapes in the header of the file with those of the model, which need no memory."""
    with torch.device("meta"):
        model = create(name, EquivariantBackbone, EquivariantViT, **sizes)
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    with safe_open(weights, framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (no dictionary)
    differ = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if differ:
        key = differ[0]
        raise ValueError(
            f"{weights} does not fit {name} {sizes or ''}: {len(differ)} entries differ, such as {key}, which has "
            f"shape {found.get(key)} and should have {expected.get(key)} (None: no such entry)"
        )


def _check_entries(model: nn.Module, loaded: Loaded) -> None:
    state = model.state_dict()
    differ = [key for key, value in loaded.state_dict.items() if not _same(state[key], value)]
    if differ:
        raise ValueError(
            f"the model is not what {loaded.weights} holds: {len(differ)} entries differ, such as {differ[0]} "
            f"({loaded.state_dict[differ[0]].dtype} in the file)"
        )


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether the values are the same in the type of the file, NaN included."""
    if ours.is_floating_point() != theirs.is_floating_point():
        return False
    ours, theirs = ours.to(theirs.dtype).double(), theirs.double()
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def _as_timm_builds_it(folder: Path, loaded: Loaded) -> EquivariantBackbone | EquivariantViT:
    """The model that `create_model('local-dir:...')` gives, which must be the one of the same name."""
    model = create(f"local-dir:{folder}", EquivariantBackbone, EquivariantViT, pretrained=True).eval()
    if type(model) is not family_of(loaded.name) or list(model.state_dict()) != list(loaded.model.state_dict()):
        raise ValueError(f"timm makes another model of {folder} than {loaded.name}")
    _check_entries(model, loaded)
    generator = torch.Generator().manual_seed(0)
    size = loaded.model.exact_sizes(33)[0]
    image = torch.randn(2, loaded.model.in_chans, size, size, generator=generator)
    with torch.no_grad():
        found, expected = model(image), loaded.model(image)
    tolerance = _TOLERANCE * expected.nan_to_num().abs().max().item()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(f"{folder / CONFIG_FILE} makes another network of {loaded.name}: other logits, same entries")
    return model
