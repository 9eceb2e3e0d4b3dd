"""Foreign checkpoint files: reading them without running code, and taking their entries one by one."""

import argparse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from equivision_timm.models.pretrained import WeightsError, impossible_entries

__all__ = ["DamagedFile", "Entries", "Translation", "read_checkpoint"]

_WRAPPERS = ("state_dict", "model", "teacher")  # Lightning and mmcv; DeiT III; DINOv2
_ADDED = ("module", "_orig_mod")  # parts of names, by data parallelism and torch.compile


class DamagedFile(WeightsError):
    """A file that cannot be read as a checkpoint."""


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save` or safetensors, on the CPU, with the dtypes of the file.

    It may be an entry `state_dict`, `model` or `teacher` of the file. `model.`, `module.` and `_orig_mod.` are removed
    from the names. No code in the file is run.

    Raises:
        OSError: the file cannot be opened.
        DamagedFile: it is not a checkpoint, is damaged, or holds objects other than tensors, numbers and texts.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        content: Any = load_file(path) if is_safetensors else _load_torch(path)
        state_dict = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
        found = {
            ".".join(part for part in name.split(".") if part not in _ADDED).removeprefix("model."): value.detach()
            for name, value in state_dict.items()
        }
        if len(found) < len(state_dict):
            raise ValueError("it holds entries with and without the prefix 'model.', two sets of weights")
        return found
    except Exception as error:  # damaged files raise many types, in zipfile, pickle, torch and safetensors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "unsupported" in line.lower()), lines[0])  # of torch.load: classes
        raise DamagedFile(f"{path} is damaged or not a checkpoint of tensors: {reason.strip()[:300]}") from error


def _load_torch(path: str | Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                archive.read(name)  # compares the checksum, which torch.load does not
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options in files of timm and DeiT III
        return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in the names and coordinates of this package."""

    state_dict: dict[str, torch.Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)  # of `timm.create_model`, where not the model's own
    notes: dict[str, str] = field(default_factory=dict)  # how it was translated, for the provenance


class Entries:
    """Foreign entries, each taken once: `left` holds the others."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        if bad := impossible_entries(state_dict):
            raise WeightsError(f"{bad[0]} holds NaN, infinity, integers or negative variances: the file is damaged")
        self.left: dict[str, torch.Tensor] = dict(state_dict)

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The entry `name`; raises WeightsError if it is missing or has another shape."""
        if name not in self.left or (shape and self.left[name].shape != shape):
            found = f"has shape {tuple(self.left[name].shape)}, not {shape}" if name in self.left else "is missing"
            raise WeightsError(f"the entry {name} {found}")
        return self.left.pop(name)

    def take_all(self, pattern: str, names: tuple[str, ...]) -> list[torch.Tensor]:
        """The entries `pattern.format(name)`."""
        return [self.take(pattern.format(name)) for name in names]

    def finish(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of `found`, float32, beside the entries that are left, which `load_state_dict` then refuses."""
        return {
            name: (value.float() if value.is_floating_point() else value).detach().contiguous().clone()
            for name, value in {**self.left, **found}.items()
        }
