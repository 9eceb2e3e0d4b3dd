"""Build hook: compiles `native.c` when the package is built, for each type of numbers and level of instructions.

    native-REAL-LEVEL.so      REAL float or double; LEVEL baseline, on x86-64 also avx2, avx512

A wheel contains the libraries beside `native.c`; an editable installation gets them there, as does

    python equivision_timm/layers/strategies/build_native.py

The compiler is that of the environment variable CC, which may contain options, or cc, gcc, clang, or else that of the
package ziglang, which the build then requires. If nothing can be compiled, the build warns and goes on without.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path

__all__ = ["LEVELS", "build", "compile_library", "compiler", "get_build_hook", "source_hash"]

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-fPIC", "-shared", "-pthread")
_AVX2 = ("-mavx2", "-mfma")
LEVELS: dict[str, tuple[str, ...]] = {"baseline": ()}  # options, besides those of the baseline
if platform.machine() == "x86_64":
    LEVELS |= {"avx2": _AVX2, "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}


def source_hash() -> str:
    """The hash of native.c; each library contains it."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command that compiles C; None if there is none."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    found = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if found is None and find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    return found and [found]


def compile_library(path: Path, real: str, level: str, command: list[str], options: tuple[str, ...] = ()) -> None:
    """Compile native.c to the shared library `path`; OSError or CalledProcessError if that fails."""
    baseline = {"x86_64": "-march=x86-64", "aarch64": "-mcpu=generic"}
    flags = [*filter(None, [baseline.get(platform.machine())]), *LEVELS[level]]  # of compilers that default to more
    if any("zig" in Path(word).name for word in command):
        flags = [flag.replace("x86-64", "x86_64") for flag in flags]
    macros = [f"-DREAL={real}", f'-DSOURCE_HASH="{source_hash()}"']
    line = [*command, *FLAGS, *flags, *macros, "-o", str(path), str(SOURCE), *options]
    subprocess.run(line, check=True, capture_output=True, text=True, errors="replace")


def build(folder: Path) -> tuple[list[Path], str]:
    """Compile all libraries to `folder`, where old ones are removed: those that succeed, and the first error or ''."""
    for old in folder.glob("native-*.so"):
        old.unlink()
    if sys.platform != "linux":
        return [], "PyTorch does not use the threads of GNU OpenMP here"
    if (command := compiler()) is None:
        return [], "no C compiler was found"

    def attempt(which: tuple[str, str]) -> str:
        try:
            compile_library(folder / f"native-{'-'.join(which)}.so", *which, command)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"{error}\n{getattr(error, 'stderr', '')}"
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        errors = list(threads.map(attempt, product(("float", "double"), LEVELS)))
    return sorted(folder.glob("native-*.so")), next(filter(None, errors), "")


def get_build_hook() -> type:
    """The build hook of hatchling, which is only importable when the package is built."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class BuildHook(BuildHookInterface):
        def dependencies(self) -> list[str]:
            return [] if compiler() or sys.platform != "linux" else ["ziglang>=0.15"]

        def initialize(self, version: str, build_data: dict) -> None:
            self.folder = None if version == "editable" else tempfile.mkdtemp()
            paths, error = build(Path(self.folder) if self.folder else SOURCE.parent)
            if error:
                self.app.display_warning(f"conv_strategy 'native' will be missing or slower: {error}")
            if not paths:
                return
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            if self.folder:
                to = SOURCE.parent.relative_to(self.root).as_posix()
                build_data["force_include"] |= {str(path): f"{to}/{path.name}" for path in paths}

        def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
            if self.folder:
                shutil.rmtree(self.folder)

    return BuildHook


if __name__ == "__main__":
    _paths, _error = build(SOURCE.parent)
    print(*[path.name for path in _paths], sep="\n")
    sys.exit(_error or None)
