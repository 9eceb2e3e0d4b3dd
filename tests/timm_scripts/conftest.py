"""timm's real scripts, from a clone of its repository named by TIMM_SCRIPTS; without one these tests are skipped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_models import write_textures

CPU_DDP = Path(__file__).with_name("cpu_ddp.py")


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The clone's folder."""
    if "TIMM_SCRIPTS" not in os.environ:
        pytest.skip("needs timm's scripts: set TIMM_SCRIPTS to a clone of its repository")
    return Path(os.environ["TIMM_SCRIPTS"])


@pytest.fixture(scope="session")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_textures(tmp_path_factory.mktemp("textures"))


@pytest.fixture(scope="session")
def run(scripts: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`run("train.py", ...)`: one of timm's scripts through our runner; `processes`: under torchrun."""

    def start(script: str, *arguments: str | Path, processes: int = 0, cwd: Path | None = None):
        torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", str(CPU_DDP)]
        launcher = torchrun if processes else ["equivision_timm"]
        command = [*launcher, str(scripts / script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=cwd, timeout=900
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return done

    return start
