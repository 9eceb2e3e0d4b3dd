"""The examples in docstrings, of the package as it is installed."""

import doctest
import importlib
import pkgutil

import equivision_timm


def test_examples():
    found = pkgutil.walk_packages(equivision_timm.__path__, "equivision_timm.")
    names = [module.name for module in found if not module.name.endswith("__main__") and "-" not in module.name]  # C
    results = [doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS) for name in names]
    assert not [name for name, result in zip(names, results, strict=True) if result.failed]
    assert sum(result.attempted for result in results) > 0
