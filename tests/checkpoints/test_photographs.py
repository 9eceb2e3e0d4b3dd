"""Crops of photographs: as many as the folder feeds, the same every time, errors that name the folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from equivision_timm.checkpoints.photographs import load_crops


def write_photographs(folder, number):
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(rng.integers(0, 255, (12, 9 + i % 3, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")


@pytest.mark.parametrize(("number", "expected"), [(3, 40), (50, 50), (300, 256)])
def test_a_crop_of_each_photograph_within_bounds(tmp_path, number, expected):
    write_photographs(tmp_path, number)
    crops = load_crops(tmp_path, size=33)
    assert crops.shape == (expected, 3, 33, 33)
    assert torch.equal(crops, load_crops(tmp_path, size=33))
    assert len({crop.sum().item() for crop in crops}) == expected  # no two alike


def test_an_explicit_number_of_crops(tmp_path):
    write_photographs(tmp_path, 5)
    assert load_crops(tmp_path, 7, 33).shape == (7, 3, 33, 33)


def test_folder_errors(tmp_path):
    with pytest.raises(NotADirectoryError, match="no-such-folder"):
        load_crops(tmp_path / "no-such-folder")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no photographs"):
        load_crops(tmp_path)
