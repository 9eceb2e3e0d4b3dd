"""Rotation and the folder of rotated images: it turns, by angles that are uniform, and the corners are filled."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset

from equivision_timm.data import PictureError
from equivision_timm.rotation import LIMITS, RotatedFolder, rotate, rotate_image

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves image files to the garbage collector


def _smooth(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([torch.sin(x + y * y), torch.cos(2 * x) * y])[None]  # [1, 2, height, width]


@given(st.integers(-9, 9))
def test_quarter_turns_move_whole_pixels_and_angles_count_modulo_a_turn(quarters: int) -> None:
    images = torch.randn(2, 3, 5, 8)
    assert torch.equal(rotate(images, 90.0 * quarters), images.rot90(quarters, dims=(-2, -1)))
    assert torch.equal(rotate(images, 30 + 360 * quarters), rotate(images, 30))


def test_same_as_pillow_inside_the_circle() -> None:
    size = 101
    image = _smooth(size, size)[0, 0].numpy()
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    inside = np.hypot(x, y) < size / 2 - 2
    for degrees in (10, 45, 73, 135, 200, -30):
        pillow = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))
        found = rotate(_smooth(size, size), degrees)[0, 0].numpy()
        assert np.abs(found - pillow)[inside].max() < 0.02
        assert np.abs(image - pillow)[inside].max() > 0.5  # the comparison would notice a wrong angle


def test_corners_are_reflected_not_black() -> None:
    grey = Image.new("RGB", (40, 30), (100, 150, 200))
    for degrees in (0, 17, 45, 60, 90):
        rotated = rotate_image(grey, degrees)
        assert np.unique(np.asarray(rotated).reshape(-1, 3), axis=0).tolist() == [[100, 150, 200]]
        assert rotated.size == ((30, 40) if degrees in (60, 90) else (40, 30))
        assert rotate_image(grey.convert("L"), degrees).mode == "L"


@pytest.fixture
def dots(tmp_path: Path) -> Path:
    """200 images of a bright dot to the right of the centre, so that an output tells its angle."""
    y, x = np.mgrid[:65, :65] - 32
    dot = (255 * np.exp(-((x - 20) ** 2 + y**2) / 18)).astype(np.uint8)
    (tmp_path / "train" / "dot").mkdir(parents=True)
    for i in range(200):
        Image.fromarray(dot).save(tmp_path / "train" / "dot" / f"{i:03}.png")
    return tmp_path


def _angle(image: Image.Image) -> float:
    """Where the dot is, in degrees counter-clockwise from the right."""
    brightness = np.asarray(image.convert("L"), dtype=float) ** 2
    y, x = np.mgrid[:65, :65] - 32
    return math.degrees(math.atan2(-(brightness * y).sum(), (brightness * x).sum())) % 360


def _assert_uniform(angles: list[float]) -> None:
    """Kolmogorov and Smirnov's statistic of 200 angles against the uniform distribution; 0.115 is its 1 % level."""
    expected = (np.arange(200) + 0.5) / 200
    assert np.abs(np.sort(angles) / 360 - expected).max() < 0.115


@pytest.mark.parametrize("limit", [22.5, 180])
def test_training_angles_are_uniform_and_new_each_time(dots: Path, limit: float) -> None:
    torch.manual_seed(0)
    folder = RotatedFolder(dots, "train", training=True, limit=limit)
    first, second = ([(_angle(folder[i][0]) + 180) % 360 - 180 for i in range(200)] for _ in range(2))
    _assert_uniform([(angle + limit) * 180 / limit for angle in first])
    if limit < 180:
        with pytest.raises(AssertionError):  # they are not uniform over all angles
            _assert_uniform([angle % 360 for angle in first])
    assert np.abs(first).max() < limit + 0.5
    assert np.abs(np.subtract(first, second)).min() > 1e-3
    torch.manual_seed(0)
    assert (_angle(folder[0][0]) + 180) % 360 - 180 == first[0]


def test_validation_angles_are_uniform_and_stay(dots: Path) -> None:
    (dots / "train").rename(dots / "val")
    folder = RotatedFolder(dots, "validation", training=False, limit=22.5)  # the limit is for training only
    angles = [_angle(folder[i][0]) for i in range(200)]
    _assert_uniform(angles)
    assert [_angle(folder[i][0]) for i in range(199, -1, -1)] == angles[::-1]


def test_names_and_arguments(dots: Path) -> None:
    for limit in LIMITS:
        assert create_dataset(f"torch/rotated_folder_{limit}", root=str(dots), split="train").limit == limit
    with pytest.raises(ValueError, match="downloads nothing"):
        create_dataset("torch/rotated_folder", root=str(dots), split="train", download=True)
    with pytest.raises(ValueError, match="no folder"):
        RotatedFolder(dots / "missing", "train", training=True)
    for limit in (0, -5, 181, math.nan):
        with pytest.raises(ValueError, match="limit"):
            RotatedFolder(dots, "train", training=True, limit=limit)


@pytest.mark.filterwarnings("ignore:left out")
def test_damaged_pictures_are_named_and_left_out(dots: Path) -> None:
    folder, files = RotatedFolder(dots, "validation", training=False), sorted((dots / "train" / "dot").iterdir())
    files[0].write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"000\.png"):
        assert folder[0][1] == 0
    for file in files:
        file.write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"\.png"):
        folder[0]


NAMES = ("torch/rotated_folder_45", "")
OPTIONS = [
    {"split": "train", "is_training": True},
    {"split": "validation"},
    {"split": "fold1", "is_training": True},
    {"split": "val", "input_img_mode": "L"},
    {"split": "val", "class_map": "map.txt"},
    {"split": "val", "class_map": "few.txt"},
    {"split": "val", "search_split": False},
]


def test_options_of_timms_scripts(tmp_path: Path) -> None:
    """Split, class map and image mode count as they do for timm's own folders; the pictures are grey all over."""
    for split, base in (("train", 0), ("val", 60), ("fold1", 120)):
        for shade, label in enumerate("abc"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (9, 9), (base + 10 * shade,) * 3).save(tmp_path / split / label / "0.png")
    (tmp_path / "map.txt").write_text("c\na\nb\n")
    (tmp_path / "few.txt").write_text("b\na\n")
    seen = []
    for options in OPTIONS:
        if "class_map" in options:
            options = {**options, "class_map": str(tmp_path / options["class_map"])}
        rotated, plain = (create_dataset(kind, root=str(tmp_path), **options) for kind in NAMES)
        found, expected = (
            [(image.mode, image.getpixel((4, 4)), target) for image, target in dataset] for dataset in (rotated, plain)
        )
        assert found == expected
        assert rotated.training is options.get("is_training", False) or options["split"] == "train"
        seen.append(found)
    assert all(a != b for a, b in itertools.combinations(seen, 2))  # control: each option matters
