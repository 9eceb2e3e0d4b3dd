"""Run timm's own model tests, unmodified, on the models of this package.

    python scripts/run_timm_tests.py                               # every registered model
    python scripts/run_timm_tests.py d4resnet18 'c8*' --sdist timm-1.0.31.tar.gz
    GITHUB_ACTIONS=1 python scripts/run_timm_tests.py              # as timm's CI: some heavy tests are left out

The tests come from the sdist of the installed timm (by default downloaded with pip). timm selects the models for its
tests of intermediates and pruning by the module that defines them, so the names are added to its module `resnet`; it
recognises ViTs, which return tokens instead of maps, by their names, so a filter 'vit_*' also matches ViTs of this
package. Its tests of pretrained models load random weights from a temporary weights folder, those of adapted models,
which load timm's weights, from a temporary cache of the Hub. `test_model_inference`, which downloads the expected
outputs of timm's `test_*` models from the Hub, is left out and listed in the summary.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: a test that needs the network fails at once

import pytest
import timm
from huggingface_hub import constants
from timm.models._hub import save_for_hf
from timm.models._registry import _module_to_models

from equivision_timm.models import model_names
from equivision_timm.models.pretrained import local_folder
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.weights.released import released

NEEDS_TIMM_HUB = "test_model_inference"
VITS = ["d1vit_*", "d4vit_*", "d4hybridvit_*", "test_d4vit*"]


class Selection:
    """pytest plugin: selects the tests parametrised by one of `names`, and reports their numbers."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.left_out: list[str] = []
        self.counts: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        selected, others = [], []
        for item in items:
            name = item.callspec.params.get("model_name", "") if hasattr(item, "callspec") else ""
            own = isinstance(name, str) and name.split(".")[0] in self.names  # 'c8resnet50.untrained' -> 'c8resnet50'
            needs_hub = item.originalname == NEEDS_TIMM_HUB
            (selected if own and not needs_hub else others).append(item)
            if own and needs_hub:
                self.left_out.append(item.nodeid)
        self.counts.update(item.originalname for item in selected)
        config.hook.pytest_deselected(items=others)
        items[:] = selected

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("timm's tests on models of equivision_timm")
        terminalreporter.write_line(f"timm {timm.__version__}, {len(self.names)} models: {' '.join(self.names)}")
        for test, count in self.counts.items():
            terminalreporter.write_line(f"{count:4d} x {test}")
        for test in self.left_out:
            terminalreporter.write_line(f"left out: {test} (needs files of timm's Hub repositories)")


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """Extract timm's tests and their pytest settings, not its code: the installed timm is tested."""
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        wanted = [m for m in archive if m.name == f"{root}/pyproject.toml" or m.name.startswith(f"{root}/tests/")]
        archive.extractall(folder, wanted, filter="data")
    return folder / root


def write_random_weights(names: list[str], folder: Path) -> None:
    """Make `folder` the local weights folder, with weights for models with pretrained weights."""
    os.environ["EQUIVISION_TIMM_WEIGHTS"] = str(folder)
    for name in set(names) & set(released()):
        write_model_folder(local_folder(name), name, timm.create_model(name).state_dict(), {"source": "random"})


def write_hub_cache(names: list[str], folder: Path) -> None:
    """Make `folder` the Hub's cache, with random weights in timm's repositories for adapted models."""
    constants.HF_HUB_CACHE = str(folder)
    for name in names:
        for tagged in timm.list_pretrained(f"{name}.*"):
            repository = timm.get_pretrained_cfg(tagged).hf_hub_id or ""
            stored = folder / f"models--{repository.replace('/', '--')}"
            if repository.startswith("timm/") and not stored.exists():
                (stored / "refs").mkdir(parents=True)
                (stored / "refs" / "main").write_text("0" * 40)
                save_for_hf(
                    timm.create_model(tagged).backbone, stored / "snapshots" / ("0" * 40), safe_serialization=True
                )


def _with_our_vits(list_models: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`list_models` with the ViTs of this package for every filter that matches timm's."""

    def also_ours(filters: str | list[str]) -> str | list[str]:
        return [*filters, *VITS] if "vit_*" in filters else filters

    def listed(filter="", *args, exclude_filters="", **kwargs) -> list[str]:
        return list_models(also_ours(filter), *args, exclude_filters=also_ours(exclude_filters), **kwargs)

    return listed


def download_sdist(folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-binary", "timm", "--dest", str(folder), f"timm=={timm.__version__}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    return next(folder.glob("timm-*.tar.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names or patterns of models (default: all)")
    parser.add_argument("--sdist", type=Path, help=f"timm-{timm.__version__}.tar.gz (default: download it with pip)")
    args = parser.parse_args()

    registered = model_names()
    for pattern in args.patterns:
        if not fnmatch.filter(registered, pattern):
            parser.error(f"no registered model matches {pattern!r}: there are {', '.join(registered)}")
    if args.sdist and args.sdist.name != f"timm-{timm.__version__}.tar.gz":
        parser.error(f"{args.sdist} is not the sdist of the installed timm: use timm-{timm.__version__}.tar.gz")
    names = [name for name in registered if any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns)]
    _module_to_models["resnet"].update(names)
    timm.list_models = _with_our_vits(timm.list_models)

    with tempfile.TemporaryDirectory() as folder:
        write_random_weights(names, Path(folder) / "weights")
        write_hub_cache(names, Path(folder) / "hub")
        root = unpack_tests(args.sdist or download_sdist(Path(folder)), Path(folder))
        settings = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-p", "no:cacheprovider", "-q", "-ra"]
        return pytest.main([*settings, str(root / "tests" / "test_models.py")], plugins=[Selection(names)])


if __name__ == "__main__":
    sys.exit(main())
