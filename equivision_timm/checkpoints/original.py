"""Read a checkpoint file of the original without running anything in it: a file -> {name: tensor}, names bare.

Both formats in use are taken: what `torch.save` wrote (a bare state dict, or a Lightning checkpoint with a
`state_dict`) and safetensors. Files from strangers are read with `weights_only=True`, which refuses every object that
could run code, and nothing that is not plainly a set of finite tensors comes out.
"""

import json
import re
import stat
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

__all__ = ["read_original"]

_MAX_BYTES = 4 << 30  # the largest published checkpoint has 0.2 GB
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"  # how torch.save has begun since version 1.6, and before


def read_original(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file, on the CPU, in the file's own types, `model.` and `module.` stripped.

    Args:
        path: a file written by `torch.save`, or a safetensors file; a symlink to one will do.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: empty, damaged, not a checkpoint, with other objects than tensors in it, or with NaN or infinity.
    """
    path = Path(path)
    state_dict = _unwrap(_load(path), path)
    names: dict[str, str] = {}
    for name, value in state_dict.items():
        _check_tensor(name, value, path)
        bare = re.sub(r"^((model|module)\.)+", "", name)
        if bare in names:
            raise ValueError(f"{path} has two entries for {bare}: {names[bare]!r} and {name!r}; remove one of them")
        names[bare] = name
    return {bare: state_dict[name] for bare, name in names.items()}


def _load(path: Path) -> object:
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
        return _load_torch(path)
    if start.startswith(_PICKLE):
        return _load_torch(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < info.st_size:
        try:
            return load_safetensors(path.read_bytes())
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is a damaged safetensors file ({error}): download it again") from error
    hint = "a web page, " if start.lstrip()[:1] == b"<" else ""
    raise ValueError(f"{path} is no checkpoint but {hint}something that begins with {start!r}: download it again")


def _check_archive(path: Path) -> None:
    """Compare the checksums of the zip archive that torch.save writes: torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen types on damaged archives
        raise ValueError(f"{path} is a damaged archive ({_one_line(error)}): download it again") from error
    if damaged:
        raise ValueError(f"{path} is damaged, {damaged} has the wrong checksum: download it again")


def _load_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle or a cut-off file can provoke; never executed
        reason = _one_line(error)
        if re.search(r"Unsupported (global|class|operand)|WeightsUnpickler error|weights_only", str(error), re.I):
            raise ValueError(
                f"{path} holds something else than tensors and is not read, for such a file can run code ({reason}). "
                "If you trust its origin, save its state dict alone: torch.save(checkpoint['state_dict'], ...)"
            ) from error
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {reason})") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0][:200]


def _unwrap(content: object, path: Path) -> dict:
    """The state dict itself: `content`, or what a Lightning checkpoint calls `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict: it is no checkpoint")
    if not content:
        raise ValueError(f"{path} holds an empty state dict: it is no checkpoint")
    return content


def _check_tensor(name: object, value: object, path: Path) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{path} has an entry whose name is {name!r}, not a string: it is no checkpoint")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{path}: entry {name!r} is {_describe(value)}, not a dense tensor: it is no checkpoint")
    if (
        value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ):  # an expanded view: tiny file, huge tensor
        raise ValueError(f"{path}: entry {name!r} claims shape {tuple(value.shape)} but the file holds less: damaged")
    if not torch.isfinite(value).all():
        raise ValueError(f"{path}: entry {name!r} holds NaN or infinity: the training diverged or the file is damaged")


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.layout} tensor of type {value.dtype}"
    return f"a {type(value).__name__} ({json.dumps(value, default=repr)[:60]})"
