"""Shared by all tests: a fixed seed, no network, no limit of time for examples, slow tests only where asked for."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported: one thread for the process of a core
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the Hub fails at once

import pytest
import torch
from hypothesis import settings

settings.register_profile("no_deadline", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("no_deadline")


def pytest_report_header():
    slow = "with" if os.environ.get("RUN_SLOW") == "1" else "without"
    return f"whole suite: about 8 minutes on two cores; {slow} the tests marked slow (gigabytes, minutes): RUN_SLOW=1"


def pytest_collection_modifyitems(items):
    if os.environ.get("RUN_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set RUN_SLOW=1 to run it"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
