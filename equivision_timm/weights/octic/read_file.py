"""Read a checkpoint file of octic-vits without running anything in it: a file -> {name: tensor}, wrappers stripped.

DeiT III files are dictionaries of a training script, the network under `model`; DINOv2 files hold the network under
`teacher`, below `backbone.`, beside the heads of the self-supervised training, which are dropped. `_orig_mod.` and
`module.` are what compilation and data parallelism put in front of names.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from equivision_timm.weights.read_file import check_tensor, load_content, strip_names

__all__ = ["OcticFile", "read_octic"]

_ALLOWED = (argparse.Namespace,)  # the options of the training script, which stand beside its network
_HEADS = ("dino_head.", "ibot_head.")
_WRAPPERS = r"((_orig_mod|module)\.)*"


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
    """Read a file of octic-vits, on the CPU, in the file's own types.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: empty, damaged, not a checkpoint, with other objects in it than tensors, numbers, texts and the
            options of the training script, or with values that are not finite.
    """
    path = Path(path)
    content = load_content(path, _ALLOWED)
    wrapper = next((key for key in ("model", "teacher") if isinstance(content.get(key), dict)), "")
    state_dict = content[wrapper] if wrapper else content
    for name, value in state_dict.items():
        check_tensor(name, value, path)
        if not value.is_floating_point():
            raise ValueError(f"{path}: entry {name[:100]!r} is of type {value.dtype}, and octic-vits has none such")
    named = strip_names(state_dict, f"^{_WRAPPERS}", path)
    heads = tuple(name for name in named if name.startswith(_HEADS))
    network = {name: value for name, value in named.items() if name not in heads}
    tensors = strip_names(network, rf"^(backbone\.)?{_WRAPPERS}", path)
    if not tensors:
        raise ValueError(f"{path} holds no network: it is no checkpoint of octic-vits")
    return OcticFile(tensors, wrapper, heads)
