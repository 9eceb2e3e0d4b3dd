"""The examples in docstrings, of the package as it is installed."""

import doctest
import importlib
import pkgutil

import pytest

import equivision_timm

FOUND = pkgutil.walk_packages(equivision_timm.__path__, "equivision_timm.")
MODULES = [module.name for module in FOUND if not module.name.endswith("__main__") and "-" not in module.name]  # C code


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


def test_there_are_examples():
    examples = [test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in examples) > 0
