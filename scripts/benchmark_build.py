"""How long building a model and importing the package take, as ratios to timm's own.

    python scripts/benchmark_build.py

Builds are timed in turn with their timm counterpart, so that a busy machine slows both; the median ratio counts. The
targets: at most 2 for c8resnet50 over resnet50, and less than 0.3 s for `import equivision_timm` after `import timm`.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import timm
import torch

import equivision_timm  # noqa: F401  (registers the models)

PAIRS = (
    ("c8resnet50", "resnet50"),
    ("d4resnet50", "resnet50"),
    ("d8resnet18", "resnet18"),
    ("c8resnet101", "resnet101"),
)
IMPORT = "import timm, time; t = time.perf_counter(); import equivision_timm; print(time.perf_counter() - t)"


def build_seconds(name: str) -> float:
    start = time.perf_counter()
    timm.create_model(name)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed builds of each model (default: %(default)s)")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}")
    for ours, theirs in PAIRS:
        first = build_seconds(ours)  # reads the frozen bases
        build_seconds(theirs)
        pairs = [(build_seconds(ours), build_seconds(theirs)) for _ in range(args.repeats)]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{ours} / {theirs}: {ratio:.2f}  ({a:.2f} s / {b:.2f} s; {ours} the first time {first:.2f} s)")
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(5)
    ]
    print(f"import equivision_timm after import timm: {statistics.median(float(run.stdout) for run in runs):.3f} s")


if __name__ == "__main__":
    main()
