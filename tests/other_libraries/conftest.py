"""Shared by the tests with other libraries: images, a model known only by its name, the effect of a quarter turn."""

import pytest
import timm
import torch
from timm.models import save_for_hf

import equivision_timm  # noqa: F401  registers the models


@pytest.fixture
def library():
    """`library("fvcore.nn")`: the module; without it the test is skipped."""
    return lambda module: pytest.importorskip(module, reason=f"extra `libraries`: {module.split('.')[0]}")


@pytest.fixture
def images():
    """Two images of 65 pixels, a size at which quarter turns are exact."""
    return torch.rand(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moves(images):
    """How far an output moves, by its largest value, when the images turn by 90 degrees and maps are turned back."""

    @torch.no_grad()
    def measure(function):
        upright, turned = function(images), function(images.rot90(1, (2, 3)))
        if upright.ndim == 4:
            turned = turned.rot90(-1, (2, 3))
        return ((upright - turned).abs().max() / upright.abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def invariant(tmp_path_factory):
    """For libraries that pass on a name and no keywords: 'local-dir:...' whose config holds map_pool."""
    folder = tmp_path_factory.mktemp("invariant")
    model = timm.create_model("test_c8resnet", pretrained=True, num_classes=0, map_pool="max")
    save_for_hf(model, str(folder), model_args={"map_pool": "max", "num_classes": 0}, safe_serialization=True)
    return f"local-dir:{folder}"


def pytest_collection_modifyitems(items):
    """Warnings of other libraries, about each other, are not for this package to correct."""
    for item in items:
        if item.path.parent.name == "other_libraries":
            item.add_marker(pytest.mark.filterwarnings("default"))
