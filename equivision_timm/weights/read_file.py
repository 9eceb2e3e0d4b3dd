"""Read a foreign checkpoint file without running anything in it, for every room: a file -> {name: tensor}.

Both formats in use are taken: what `torch.save` wrote and safetensors. Files from strangers are read with
`weights_only=True`, which refuses every object that could run code; what a room's training script writes beside its
network it names itself, as `allowed`. Archives are compared with their checksums and pickles are measured before
torch sees them, and nothing that is not plainly a set of finite tensors comes out.
"""

import io
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from equivision_timm.weights.pickle_size import check_pickle

__all__ = ["check_tensor", "load_content", "read_checkpoint", "strip_names"]

_MAX_BYTES = 8 << 30  # a ViT-H has 1.4 GB, and four times as much with its average and the state of its optimiser
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_LEGACY_PICKLES = 5  # magic number, version, system, the object, the names of its storages
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"  # how torch.save has begun since version 1.6, and before


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, on the CPU, in the file's own types, `model.` and `module.` stripped.

    Args:
        path: a bare state dict or a checkpoint of Lightning or mmcv with a `state_dict`, written by `torch.save`; or a
            safetensors file; a symlink to one will do.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: empty, damaged, not a checkpoint, with other objects than tensors of real numbers in it, or with
            NaN or infinity.
    """
    path = Path(path)
    content = load_content(path)
    state_dict = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    if not state_dict:
        raise ValueError(f"{path} holds an empty state dict: it is no checkpoint")
    for name, value in state_dict.items():
        check_tensor(name, value, path)
    return strip_names(state_dict, r"^((model|module)\.)+", path)


def load_content(path: Path, allowed: tuple[type, ...] = ()) -> dict[Any, Any]:
    """The dictionary that a file holds, on the CPU; what is in it is not looked at.

    Args:
        path: written by `torch.save`, or a safetensors file.
        allowed: classes that may stand beside tensors, numbers and texts; making one must do nothing.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: empty, damaged, no dictionary, or with objects of other classes in it.
    """
    content = _load(path, allowed)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict: it is no checkpoint")
    return content


def strip_names(tensors: Mapping[str, torch.Tensor], prefix: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors with the pattern `prefix` taken off their names.

    Raises:
        ValueError: two of them then have one name.
    """
    names: dict[str, str] = {}
    for name in tensors:
        bare = re.sub(prefix, "", name)
        if bare in names:
            raise ValueError(
                f"{path} has two entries for {bare[:60]}: {names[bare][:60]!r} and {name[:60]!r}; remove one of them"
            )
        names[bare] = name
    return {bare: tensors[name] for bare, name in names.items()}


def _load(path: Path, allowed: tuple[type, ...]) -> object:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a device or pipe"
        raise ValueError(f"{path} is {kind}: name the checkpoint file itself")
    if not 0 < info.st_size <= _MAX_BYTES:
        raise ValueError(f"{path} has {info.st_size} bytes: it is no checkpoint; download it again")
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(_ZIP):
        _check_archive(path)
        _check_pickles(path, is_archive=True)
        return _load_torch(path, allowed)
    if start.startswith(_PICKLE):
        _check_pickles(path, is_archive=False)
        return _load_torch(path, allowed)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < info.st_size:
        try:
            return load_safetensors(path.read_bytes())
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is a damaged safetensors file ({error}): download it again") from error
    hint = "a web page, " if start.lstrip()[:1] == b"<" else ""
    raise ValueError(f"{path} is no checkpoint but {hint}something that begins with {start!r}: download it again")


def _check_archive(path: Path) -> None:
    """Compare the checksums of the zip archive that torch.save writes: torch.load does not.

    It holds its files as they are, one behind the other: one that unpacks to more than its own size is refused first.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            damaged = archive.testzip() if unpacked <= path.stat().st_size else None
    except Exception as error:  # zipfile raises half a dozen types on damaged archives
        raise ValueError(f"{path} is a damaged archive ({_one_line(error)}): download it again") from error
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"{path} is a compressed archive, which torch.save does not write, and unpacks to {unpacked} bytes: save "
            "the state dict with torch.save or as safetensors"
        )
    if damaged:
        raise ValueError(f"{path} is damaged, {damaged} has the wrong checksum: download it again")


def _check_pickles(path: Path, is_archive: bool) -> None:
    """Refuse what would keep torch.load busy without end."""
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.lower().endswith("data.pkl"):
                        check_pickle(io.BytesIO(archive.read(name)))
        else:
            with path.open("rb") as file:
                for _ in range(_LEGACY_PICKLES):
                    check_pickle(file)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint: {error}") from error


def _load_torch(path: Path, allowed: tuple[type, ...]) -> object:
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle or a cut-off file can provoke; never executed
        reason = _one_line(error)
        if re.search(r"Unsupported (global|class|operand)|WeightsUnpickler error|weights_only", str(error), re.I):
            raise ValueError(
                f"{path} holds something else than tensors and is not read, for such a file can run code ({reason}). "
                "If you trust its origin, load it and save its state dict alone: torch.save(checkpoint[...], ...)"
            ) from error
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {reason})") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0][:200]


def check_tensor(name: object, value: object, path: Path) -> None:
    """Raise ValueError unless this entry of a state dict is a dense, finite tensor of real numbers, with a name."""
    if not isinstance(name, str):
        raise ValueError(
            f"{path} has an entry whose name is a {type(name).__name__}, not a string: it is no checkpoint"
        )
    entry = f"{path}: entry {name[:100]!r}"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{entry} is a {type(value).__name__}, not a tensor: it is no checkpoint")
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested or value.layout != torch.strided:
        kind = "a nested" if value.is_nested else f"a {str(value.layout).removeprefix('torch.')}"
        raise ValueError(f"{entry} is {kind} {type(value).__name__}, not a dense tensor: it is no checkpoint")
    if value.device.type != "cpu":
        raise ValueError(f"{entry} is on the device {value.device} and holds no values: save it from a loaded model")
    if value.is_quantized or value.dtype not in _DTYPES:
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{entry} is of type {dtype}, not of real numbers that we know: save it as float32")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # an expanded view: tiny file, huge tensor
        raise ValueError(f"{entry} claims shape {tuple(value.shape)} but the file holds less: damaged")
    if not torch.isfinite(value).all():
        raise ValueError(f"{entry} holds NaN or infinity: the training diverged or the file is damaged")
