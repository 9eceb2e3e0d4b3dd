"""Write a model folder that timm's `local-dir:` loads, all or nothing; the provenance of its weights.

The files are written to a hidden folder beside the target, flushed to the disk, and only then moved into place: a full
disk, a crash or a kill leaves the target as it was. What a killed process may leave is the hidden folder alone.
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
from safetensors.torch import save
from timm.models._hub import save_config_for_hf

from equivision_timm.arguments import InputError
from equivision_timm.files import check_writable, sync_folder, write_file
from equivision_timm.models.pretrained import WEIGHTS_FILE

__all__ = [
    "CONFIG_FILE",
    "Report",
    "check_model_folder",
    "read_provenance",
    "versions",
    "write_config",
    "write_model_folder",
]

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Report:
    """What was converted, for people: as text a row for each entry.

    Attributes:
        folder: the model folder that was written.
        provenance: where the weights come from, as written into the file.
    """

    folder: Path
    provenance: dict[str, str]

    def __str__(self) -> str:
        rows = {"written": str(self.folder), **self.provenance}
        return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def check_model_folder(folder: str | Path, model_name: str) -> None:
    """Find out whether `write_model_folder` can write a model here, before the work whose result it is to hold.

    Raises:
        InputError: it cannot, or the folder holds something else.
    """
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
        raise InputError(f"{folder} holds {held}, and {model_name} would take its place: name another folder")


def write_model_folder(
    folder: str | Path,
    model_name: str,
    state_dict: dict[str, torch.Tensor],
    provenance: dict[str, str],
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json` to `folder`, or leave it as it is.

    Args:
        folder: created where missing. One that exists keeps its other files; it may hold the same model only.
        model_name: e.g. 'c8resnet50'.
        state_dict: exactly the entries of this model.
        provenance: where the weights come from; goes into the metadata of the safetensors file.
        model_args: keywords of the model, where the weights are for others than its own; go into the config.

    Returns:
        The folder.

    Raises:
        ValueError: the weights do not fit the model, or `folder` cannot be written or holds another model.
        OSError: writing fails; nothing has changed.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        model = timm.create_model(model_name, **(model_args or {}))
    _check_fit(model.state_dict(), state_dict, model_name)
    check_model_folder(folder, model_name)
    tensors = {name: value.contiguous() for name, value in state_dict.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        write_config(model, staging / CONFIG_FILE, model_args)
        write_file(staging / CONFIG_FILE, (staging / CONFIG_FILE).read_bytes())  # flushed
        write_file(staging / WEIGHTS_FILE, save(tensors, metadata={"format": "pt", **provenance}))
        folder.mkdir(exist_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):  # the same config as before, so any order is consistent
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def write_config(model: torch.nn.Module, path: Path, model_args: dict[str, Any] | None = None) -> None:
    """Write timm's `config.json` of a model, and the keywords that it was made with, if they are not its own."""
    config_path: Any = path  # as old versions of timm need it; new ones say that it is a str
    save_config_for_hf(model, config_path, model_args=model_args)


def read_provenance(path: str | Path) -> dict[str, str]:
    """The provenance of a safetensors file, or of the one in a model folder; empty where it carries none.

    Raises:
        OSError: there is no such file.
        ValueError: it is no safetensors file.
    """
    path = Path(path)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    return {key: metadata[key] for key in sorted(metadata) if key != "format"}


def versions() -> dict[str, str]:
    """The versions of what converts, and the date, for the provenance."""
    names = ("equivision-timm", "timm", "torch", "safetensors")
    return {**{name: version(name) for name in names}, "date": datetime.now(timezone.utc).date().isoformat()}


def _check_fit(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], model_name: str) -> None:
    names = [name for name in {**expected, **found} if name not in expected or name not in found]
    names += [name for name in expected if name in found and expected[name].shape != found[name].shape]
    if names:
        raise ValueError(f"these weights do not fit {model_name}: {len(names)} entries differ, {', '.join(names[:3])}")
