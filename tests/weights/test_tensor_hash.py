"""The hash of a state dict: any change of a name, a type, a shape or a value is seen, and nothing else."""

import hashlib

import pytest
import torch

from equivision_timm.models.tensor_hash import hash_tensors

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7), "c": torch.ones(3)}
CHANGED = {
    "a value": {**STATE, "c": torch.tensor([1.0, 1.0, 1.0000001])},
    "two swapped": {**STATE, "c": STATE["a"][0, :3], "a": STATE["a"].flip(0)},
    "the sign of a zero": {**STATE, "a": STATE["a"] * torch.where(STATE["a"] == 0, -1.0, 1.0)},
    "a type": {**STATE, "b": torch.tensor(7, dtype=torch.int32)},
    "the same bytes in another type": {**STATE, "c": torch.ones(3).view(torch.int32)},
    "a shape": {**STATE, "a": STATE["a"].reshape(4, 3)},
    "a name": {"a": STATE["a"], "b": STATE["b"], "d": STATE["c"]},
    "one more": {**STATE, "d": torch.zeros(0)},
    "one less": {"a": STATE["a"], "b": STATE["b"]},
}


@pytest.mark.parametrize("state", CHANGED.values(), ids=CHANGED)
def test_every_change_is_seen(state):
    assert hash_tensors(state) != hash_tensors(STATE)


def test_order_and_memory_do_not_matter():
    other = {"c": torch.ones(()).expand(3), "b": STATE["b"], "a": STATE["a"].t().contiguous().t()}
    assert hash_tensors(other) == hash_tensors(STATE)
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert hash_tensors({"z": z.conj()}) == hash_tensors({"z": z.conj().resolve_conj()}) != hash_tensors({"z": z})


def test_the_definition():
    """Written out for one entry, so that files converted today can be compared with tomorrow's package."""
    parts = [b"w", b"float32", b"(2,)", b"\x00\x00\x80\x3f\x00\x00\x00\x40"]
    expected = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()
    assert hash_tensors({"w": torch.tensor([1.0, 2.0])}) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_every_type(dtype):
    assert len(hash_tensors({"w": torch.ones(2, 3).to(dtype), "empty": torch.zeros(0, 3).to(dtype)})) == 64
