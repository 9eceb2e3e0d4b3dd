"""The order of the rooms: imports go one way, escnn is imported in one file, and importing the package is light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import equivision_timm

PACKAGE = Path(equivision_timm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "torch_state",
    "errors",
    "files",
    "groups",
    "constants",
    "kernels",
    "kernel_basis",
    "irreps_basis",
    "escnn_interop",
    "layers",
    "models",
    "data",
    "rotation",
    "weights",
    "cli",
)
ANYWHERE = {"testing"}  # uses only groups


def imports(path):
    """Full names of the modules and of what is imported from them when the code runs, also inside functions."""
    tree = ast.parse(path.read_text())
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = [branch for branch in branches if "TYPE_CHECKING" in ast.dump(branch.test)]
    skipped = {id(child) for branch in typing_only for child in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            assert all(alias.name != "*" for alias in node.names), f"{path} imports *"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "equivision_timm" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    imported = {room(module) for module in imports(path)} - {None, own}
    if own == "testing":
        assert imported <= {"groups", "torch_state"}
    if own in ORDER:
        later = ORDER[ORDER.index(own) + 1 :]
        assert not imported & set(later), f"{own} comes before {imported & set(later)}"


def test_only_the_bridge_imports_escnn():
    importers = {path.name for path in FILES for module in imports(path) if module.split(".")[0] == "escnn"}
    assert importers == {"escnn_interop.py"}


def test_the_rooms_exist():
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert rooms == {*ORDER, *ANYWHERE, "__init__", "__main__"}


def test_translators_of_foreign_formats_do_not_know_each_other():
    formats = {"equivision", "flopping", "octic", "redet"}
    for path in FILES:
        imported = {module.split(".")[2] for module in imports(path) if module.startswith("equivision_timm.weights.")}
        allowed = {"convert.py": formats}.get(path.name, {path.stem})
        assert imported & formats <= allowed, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_internals_of_pytorch_are_used_in_one_file(path):
    tree = ast.parse(path.read_text())
    found = [module for module in imports(path) if module.split(".")[0] == "torch" and "._" in module]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found += [node.attr] if ast.unparse(node.value).split(".")[0] in ("torch", "nn", "forward_ad") else []
    assert bool(found) == (path.name == "torch_state.py"), found


def test_importing_the_package_is_light():
    code = "import sys, json, equivision_timm; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", code])))
    assert "equivision_timm.models.equivariant_resnet" in loaded
    assert not loaded & {
        "escnn",
        "matplotlib",
        "sklearn",
        "scipy",
        "skimage",
        "onnx",
        "gdown",
        "equivision_timm.cli",
    }
