"""One hash for all tensors of a state dict: `convert` keeps it in the metadata, `verify` compares it with the file."""

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["TENSORS_SHA256", "hash_tensors"]

TENSORS_SHA256 = "tensors_sha256"  # the key in the metadata of a safetensors file


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the order of the entries and the strides of the tensors.

    Args:
        state_dict: dense tensors of any type and shape, on any device that holds values.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> hash_tensors({"weight": torch.zeros(2, 3)})[:8] == hash_tensors({"weight": torch.zeros(3, 2)})[:8]
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        values = value.flatten().view(torch.uint8).numpy().data
        dtype = str(value.dtype).removeprefix("torch.")
        for part in (name.encode(), dtype.encode(), str(tuple(value.shape)).encode(), values):
            digest.update(len(part).to_bytes(8, "little"))  # so that no two state dicts give the same stream
            digest.update(part)
    return digest.hexdigest()
