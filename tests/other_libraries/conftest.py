"""Shared by the tests beside other libraries: images, a model known by its name alone, and what a quarter turn does."""

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

import equivision_timm  # noqa: F401  registers the models


@pytest.fixture
def images():
    """Two images of 65 pixels, a size at which quarter turns are exact."""
    return torch.rand(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moves(images):
    """How far an output moves, by its largest value, when the images turn by 90 degrees and maps are turned back."""

    def measure(function):
        with torch.no_grad():
            upright, turned = function(images), function(images.rot90(1, (2, 3)))
        if upright.ndim == 4:
            turned = turned.rot90(-1, (2, 3))
        return ((upright - turned).abs().max() / upright.abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def invariant_folder(tmp_path_factory):
    """For libraries that pass on a name and no keywords: 'local-dir:...' whose config holds map_pool."""
    folder = tmp_path_factory.mktemp("invariant")
    model = timm.create_model("test_c8resnet", pretrained=True, num_classes=0, map_pool="max")
    save_for_hf(model, str(folder), model_args={"map_pool": "max", "num_classes": 0}, safe_serialization=True)
    return f"local-dir:{folder}"


def pytest_collection_modifyitems(items):
    """Warnings of other libraries, about each other, are not ours to mend."""
    for item in items:
        if item.path.parent.name == "other_libraries":
            item.add_marker(pytest.mark.filterwarnings("default"))
