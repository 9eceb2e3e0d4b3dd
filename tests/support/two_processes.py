"""A script in two processes under torchrun."""

import subprocess
import sys
from pathlib import Path

__all__ = ["run_in_two"]

_END = """
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of PyTorch that still run would abort the process, now and then
"""


def run_in_two(script: str, folder: Path, argument: str) -> None:
    """Run the text of a script, which imports `os` and `torch.distributed as dist`, with one argument."""
    path = folder / "script.py"
    path.write_text(script + _END)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([sys.executable, *launcher, path, argument], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
