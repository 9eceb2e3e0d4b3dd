"""Shared by all tests: a fixed seed, no network, and the groups and kernels for which bases are frozen."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the Hub fails at once

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
