"""Foreign checkpoint files: reading them without running code, and checks of their tensors."""

import argparse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file

from equivision_timm.models.pretrained import WeightsError, impossible_entries

__all__ = ["DamagedFile", "Entries", "Translation", "read_checkpoint"]

_WRAPPERS = ("state_dict", "model", "teacher")  # Lightning and mmcv; DeiT III; DINOv2
_ADDED = ("module", "_orig_mod")  # parts of names, by data parallelism and torch.compile


class DamagedFile(WeightsError):
    """A file that cannot be read as a checkpoint."""


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in the names and coordinates of this package.

    Attributes:
        state_dict: the entries of the model, float32.
        keywords: arguments of `timm.create_model` that differ from the model's own.
        notes: how it was translated, for the provenance.
    """

    state_dict: dict[str, torch.Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


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
        return self.left.pop(name).detach()

    def take_all(self, pattern: str, names: tuple[str, ...]) -> list[torch.Tensor]:
        """The entries `pattern.format(name)`."""
        return [self.take(pattern.format(name)) for name in names]

    def finish(self, found: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """`found` as the state dict of `model`; raises WeightsError if entries are left or shapes differ."""
        entries = model.state_dict()
        faults = [f"{name} is left over, one of {len(self.left)} entries" for name in self.left]
        for name, expected in entries.items():
            if found[name].shape != expected.shape:
                faults.append(f"{name} would have shape {tuple(found[name].shape)}, not {tuple(expected.shape)}")
        if faults:
            raise WeightsError(faults[0])
        return {name: found[name].detach().to(value.dtype).contiguous().clone() for name, value in entries.items()}


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save` or safetensors, on the CPU, with the dtypes of the file.

    It may be an entry `state_dict`, `model` or `teacher` of the file. `model.`, `module.` and `_orig_mod.` are removed
    from the names. No code in the file is run.

    Raises:
        OSError: the file cannot be opened.
        DamagedFile: it is not a checkpoint, is damaged, or holds objects other than tensors, numbers and texts.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        content = load_file(path) if start[8:] == b"{" else _load_torch(path)
    except Exception as error:  # damaged files raise many types, in zipfile, pickle, torch and safetensors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "unsupported" in line.lower()), lines[0])  # of torch.load: classes
        raise DamagedFile(f"{path} is damaged or not a checkpoint of tensors: {reason.strip()[:300]}") from error
    wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    state_dict = content[wrapper] if wrapper else content
    pairs = state_dict.items() if isinstance(state_dict, dict) else ()
    fault = "does not hold a state dict, {name: tensor}: it is not a checkpoint"
    if pairs and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in pairs):
        names = [".".join(p for p in name.split(".") if p not in _ADDED).removeprefix("model.") for name, _ in pairs]
        if len(set(names)) == len(names):
            return dict(zip(names, (value for _, value in pairs), strict=True))
        twice = next(name for name in names if names.count(name) > 1)
        fault = f"holds {twice!r} twice, with and without a prefix: remove one of them"
    raise DamagedFile(f"{path} {fault}")


def _load_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has the wrong checksum")
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options in files of timm and DeiT III
        return torch.load(path, map_location="cpu", weights_only=True)
