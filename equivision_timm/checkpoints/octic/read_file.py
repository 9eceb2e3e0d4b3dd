"""Read a checkpoint file of octic-vits without running anything in it: a file -> {name: tensor}, wrappers stripped.

DeiT III files are dictionaries of a training script, the network under `model`; DINOv2 files hold the network under
`teacher`, below `backbone.`, beside the heads of the self-supervised training, which are dropped. `_orig_mod.` and
`module.` are what compilation and data parallelism put in front of names.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["OcticFile", "read_octic"]

_STARTS = (b"PK\x03\x04", b"\x80\x02")  # how torch.save has begun since version 1.6, and before
_ALLOWED = (argparse.Namespace,)  # the options of the training script, which stand beside its network
_HEADS = ("dino_head.", "ibot_head.")
_PREFIX = re.compile(r"^((_orig_mod|module)\.)+")


@dataclass(frozen=True)
class OcticFile:
    """What a file holds.

    Attributes:
        tensors: {name: tensor}, in the naming of the network.
        wrapper: under what they lay: 'model', 'teacher', or '' for a bare state dict.
        dropped: names of entries of the training that the network has no use for.
    """

    tensors: dict[str, torch.Tensor]
    wrapper: str
    dropped: tuple[str, ...]


def read_octic(path: str | Path) -> OcticFile:
    """Read a file that `torch.save` wrote, on the CPU, in the file's own types.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: empty, damaged, not a checkpoint, with other objects in it than tensors, numbers, texts and the
            options of the training script, or with values that are not finite.
    """
    path = Path(path)
    content = _load(path)
    wrapper = next((key for key in ("model", "teacher") if isinstance(content.get(key), dict)), "")
    state_dict = content[wrapper] if wrapper else content
    tensors: dict[str, torch.Tensor] = {}
    dropped = []
    for key, value in state_dict.items():
        _check(key, value, path)
        name = _PREFIX.sub("", key)
        if name.startswith(_HEADS):
            dropped.append(name)
            continue
        name = _PREFIX.sub("", name.removeprefix("backbone."))
        if name in tensors:
            raise ValueError(f"{path} has two entries for {name[:60]}: remove one of them")
        tensors[name] = value
    if not tensors:
        raise ValueError(f"{path} holds no network: it is no checkpoint of octic-vits")
    return OcticFile(tensors, wrapper, tuple(dropped))


def _load(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(_STARTS):
        hint = "a web page, " if start.lstrip()[:1] == b"<" else ""
        raise ValueError(f"{path} is no checkpoint but {hint}something that begins with {start!r}: download it again")
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle or a cut-off file can provoke; never executed
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line), lines[0])[:200]
        if re.search(r"Unsupported (global|class|operand)|WeightsUnpickler error|weights_only", str(error), re.I):
            raise ValueError(
                f"{path} holds something else than tensors and is not read, for such a file can run code ({reason}). "
                "If you trust its origin, save its network alone: torch.save(checkpoint['model'], ...)"
            ) from error
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict: it is no checkpoint")
    return content


def _check(name: object, value: object, path: Path) -> None:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{path}: entry {str(name)[:100]!r} is a {type(value).__name__}, not a tensor: it is no checkpoint of "
            "octic-vits"
        )
    dense = value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
    whole = dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # no expanded view
    if not whole or not value.is_floating_point():
        raise ValueError(f"{path}: entry {name[:100]!r} is no dense tensor of real numbers: damaged, or no checkpoint")
    if not torch.isfinite(value).all():
        raise ValueError(f"{path}: entry {name[:100]!r} holds NaN or infinity: the training diverged, or it is damaged")
