"""Crops of photographs: as many as the folder feeds, the same every time, errors that name the folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from equivision_timm.data import draw_crops, load_crops, load_photographs


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


def test_folders_without_readable_photographs(tmp_path):
    with pytest.raises(ValueError, match="no-such-folder"):
        load_crops(tmp_path / "no-such-folder")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        load_crops(tmp_path)


def test_large_photographs_are_kept_small(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((3000, 2000)).save(tmp_path / "x.jpg")
    (photograph,) = load_photographs(tmp_path)
    assert photograph.nbytes <= 3 << 20
    assert photograph.shape[1] / photograph.shape[0] == pytest.approx(1.5, rel=1e-2)
    with Image.open(tmp_path / "x.jpg") as file:
        whole = np.asarray(file)
    assert photograph.mean() == pytest.approx(whole.mean(), abs=0.5)


def test_further_crops_are_others(tmp_path):
    write_photographs(tmp_path, 3)
    photographs = load_photographs(tmp_path)
    assert torch.equal(draw_crops(photographs, size=33), load_crops(tmp_path, size=33))
    assert not torch.equal(draw_crops(photographs, size=33, seed=1), load_crops(tmp_path, size=33))
