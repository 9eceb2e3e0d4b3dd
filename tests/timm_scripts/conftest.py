"""timm's real scripts, from a clone of its repository named by TIMM_SCRIPTS; without one these tests are skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_models import write_textures

CPU_DDP = Path(__file__).with_name("cpu_ddp.py")


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    return write_textures(tmp_path_factory.mktemp("textures"))


@pytest.fixture(scope="session")
def run(timm_scripts):
    """`run("train.py", ...)`: one of timm's scripts through the package's runner; `processes`: under torchrun."""

    def start(script, *arguments, processes=0, cwd=None):
        torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", CPU_DDP]
        command = [*(torchrun if processes else ["equivision_timm"]), timm_scripts / script, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=900)
        assert done.returncode == 0, done.stderr[-5000:]
        return done

    return start
