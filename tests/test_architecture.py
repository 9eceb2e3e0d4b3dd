"""Imports go one way, and escnn and internals of PyTorch are used in one file each."""

import ast
from functools import cache
from pathlib import Path

import equivision_timm

PACKAGE = Path(equivision_timm.__file__).parent
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


@cache
def trees():
    """{path in the package: its syntax tree}."""
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree):
    """Full names of the modules and of what is imported from them when the code runs, also inside functions."""
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = [branch for branch in branches if "TYPE_CHECKING" in ast.dump(branch.test)]
    skipped = {id(child) for branch in typing_only for child in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)  # absolute
            assert all(alias.name != "*" for alias in node.names), ast.unparse(node)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    """The file or folder at the top of the package."""
    return path.with_suffix("").parts[0]


def imported_parts(tree):
    names = [module.split(".") for module in imports(tree)]
    return {parts[1] for parts in names if parts[0] == "equivision_timm" and len(parts) > 1}


def test_imports_go_one_way():
    assert {part(path) for path in trees()} == {*ORDER, "testing", "__init__", "__main__"}
    for path, tree in trees().items():
        own, imported = part(path), imported_parts(tree)
        if own == "testing":
            assert imported <= {"errors", "groups"}
        if own in ORDER:
            later = set(ORDER[ORDER.index(own) + 1 :])
            assert not imported & later, f"{path} comes before {imported & later}"


def test_only_the_bridge_imports_escnn():
    importers = {path.name for path, tree in trees().items() for name in imports(tree) if name.split(".")[0] == "escnn"}
    assert importers == {"escnn_interop.py"}


def test_translators_of_foreign_formats_do_not_know_each_other():
    formats = {"equivision", "flopping", "octic", "redet"}
    for path, tree in trees().items():
        imported = {name.split(".")[2] for name in imports(tree) if name.startswith("equivision_timm.weights.")}
        allowed = {"convert.py": formats}.get(path.name, {path.stem})
        assert imported & formats <= allowed, path


def test_internals_of_pytorch_are_used_in_one_file():
    for path, tree in trees().items():
        found = [name for name in imports(tree) if name.split(".")[0] == "torch" and "._" in name]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                found += [node.attr] if ast.unparse(node.value).split(".")[0] in ("torch", "nn", "forward_ad") else []
        assert bool(found) == (path.name == "torch_state.py"), (path, found)
