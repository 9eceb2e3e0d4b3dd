"""`sample_kernels` of `scripts/escnn_kernels.py`."""

import runpy
from pathlib import Path

sample_kernels = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "escnn_kernels.py"))["sample_kernels"]
