"""What each process of a group does, for tests that start several."""

import os

import timm
import torch

import equivision_timm
from equivision_timm.models import tune as tune_module


def tune_in_group(rank: int, folder: str) -> None:
    """One of two: only the first measures, both take its choice; each has a cache folder of its own."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{rank}"
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    choice = {"layer1.0.conv1.conv": "block_diagonal"}
    measured_by = []
    tune_module.measure = lambda *_: measured_by.append(rank) or tune_module.Tuning({}, choice, {}, True)
    model = timm.create_model("test_c8resnet")
    assert equivision_timm.tune(model, size=33, batch_size=1) == choice
    assert model.layer1[0].conv1.conv.strategy == "block_diagonal"
    assert measured_by == ([0] if rank == 0 else [])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
