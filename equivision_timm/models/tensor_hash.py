"""Hash of the tensors of a state dict."""

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["TENSORS_SHA256", "hash_tensors"]

TENSORS_SHA256 = "tensors_sha256"  # the key in the metadata of a safetensors file


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, independent of the order of entries and of strides.

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
            digest.update(len(part).to_bytes(8, "little"))  # separates the parts
            digest.update(part)
    return digest.hexdigest()
