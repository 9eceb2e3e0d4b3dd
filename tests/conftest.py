"""Shared by all tests: a fixed seed, no network, no deadline for hypothesis, slow tests only on request."""

import gc
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported: one thread for each process
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the Hub fails at once

import pytest
from hypothesis import settings

settings.register_profile("no_deadline", settings(), deadline=None)  # a busy machine is not a failure
settings.load_profile("no_deadline")


def pytest_report_header():
    slow = "with" if os.environ.get("RUN_SLOW") == "1" else "without"
    return f"whole suite: about 5 minutes on two cores; {slow} the tests marked slow (gigabytes, minutes): RUN_SLOW=1"


def pytest_collection_modifyitems(items):
    if os.environ.get("RUN_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set RUN_SLOW=1 to run it"))


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay to the end; searching them for garbage takes 5 % of the time


@pytest.fixture(autouse=True)
def seed():
    import torch  # here: pytest-xdist's controller, which runs no test, starts its workers two seconds earlier

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm_scripts() -> Path:
    """The folder of timm's scripts: a clone of its repository, named by TIMM_SCRIPTS."""
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip("needs timm's scripts: set TIMM_SCRIPTS to a clone of its repository")
    return Path(os.environ["TIMM_SCRIPTS"]).resolve()
