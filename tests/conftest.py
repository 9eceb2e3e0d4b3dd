"""Shared by all tests: a fixed seed, no network, and slow tests only where they are asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the Hub fails at once

import pytest
import torch


def pytest_collection_modifyitems(items):
    if os.environ.get("RUN_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set RUN_SLOW=1 to run it"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
