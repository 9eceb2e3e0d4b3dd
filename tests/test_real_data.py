"""scripts/real_data.py on generated images: splits, exactness with a plain network as the control, resumed results."""

import dataclasses
import sys
from functools import partial

import deep_sky
import numpy as np
import pytest
import real_data
import real_training
import solar_cells
import timm
import torch
from support.sky import write_sky

SPLITS = solar_cells.TASK.splits


@pytest.fixture(scope="module")
def cells():
    """Noise, and a dark horizontal or vertical crack in defective cells: 400 of 33 pixels, a quarter defective."""
    generator = torch.Generator().manual_seed(0)
    images = 160 + 20 * torch.randn(400, 1, 33, 33, generator=generator)
    targets = torch.tensor([0, 0, 1 / 3, 1]).repeat(100)
    for image, p in zip(images, targets, strict=True):
        if p > 0.5:
            image[0, int(torch.randint(6, 26, (), generator=generator))] = 0
    strata = (3 * targets).round().long() + 4 * (torch.arange(400) >= 200)
    return real_training.Data(images.clamp(0, 255).to(torch.uint8), targets, strata, torch.arange(400))


def row(name, **arguments):
    return real_training.Row(partial(real_training.scratch, name), size=33, epochs=3, **arguments)


def test_a_random_split_is_stratified(cells):
    train, test = SPLITS["random"](cells, 0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(400))
    assert cells.strata[test].bincount().tolist() == (cells.strata.bincount() / 4).round().tolist()
    assert not torch.equal(test, SPLITS["random"](cells, 1)[1])


def test_a_block_is_a_module_away_from_training(cells):
    """Within a wafer's files no training image is nearer than a module; in a random split most are (the control)."""
    strata = torch.tensor([0, 4]).repeat_interleave(500)[
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    ]
    files = dataclasses.replace(cells, strata=strata, groups=torch.arange(1000))

    def nearest(split):
        train, test = SPLITS[split](files, 3)
        found = []
        for wafer in (0, 4):
            order = (strata == wafer).long().cumsum(0)
            places = [order[part[strata[part] == wafer]] for part in (train, test)]
            found.append((places[1][:, None] - places[0]).abs().min().item())
        return min(found), len(test)

    assert nearest("blocks") == (73, 250)
    assert nearest("random")[0] == 1


def test_an_equivariant_network_answers_the_same_in_all_orientations(cells):
    """The plain one, trained upright, does not, and loses accuracy on the cracks that run the other way."""
    exact, plain = (
        real_training.run(row(name, moved=False), solar_cells.TASK, cells, "random", 0)
        for name in ("test_d4resnet", "test_c1resnet")
    )
    assert exact["drift"] < 1e-5
    assert exact["views"] == exact["averaged"] * 8
    assert exact["averaged"][0][0] > 85  # all sound: 75
    assert plain["drift"] > 0.1
    assert plain["views"][0][0] > plain["views"][1][0] + 5


@pytest.mark.parametrize("training", [{"epochs": 0}, {"epochs": 2, "layer_decay": 0.85}], ids=["frozen", "fine-tuned"])
def test_a_pretrained_network_is_fitted_and_exact(cells, monkeypatch, training):
    monkeypatch.setattr(real_training, "lite0", lambda: timm.create_model("test_efficientnet").eval())
    row = real_training.Row(real_training.pretrained, size=33, **training)
    result = real_training.run(row, solar_cells.TASK, cells, "random", 0)
    assert result["drift"] < 1e-4
    assert result["averaged"][0][1] > 60  # random features
    assert len({tuple(view) for view in result["views"]}) > 1  # of the backbone


def test_scores():
    logits, p = torch.tensor([[-2.0], [-1.0], [1.0], [1.0]]), torch.tensor([0.0, 1.0, 1 / 3, 2 / 3])
    assert solar_cells.scores(logits, p) == [50.0, 62.5]  # pairs: right, right, wrong, a tie
    assert deep_sky.scores(torch.eye(4), torch.tensor([0, 0, 2, 3])) == [75.0, 83.33]  # of classes 1/2, 1, 1


def test_the_class_of_a_photograph():
    """By the object that fills it; None by none near the centre, and where another class is nearly as large."""
    galaxy_and_cluster = partial(deep_sky.class_of, classes=np.array([0, 2]))
    assert galaxy_and_cluster(np.array([0.1, 0.2]), np.array([0.9, 0.1])) == 0
    assert galaxy_and_cluster(np.array([0.3, 0.1]), np.array([0.1, 0.9])) == 2
    assert galaxy_and_cluster(np.array([0.1, 0.2]), np.array([0.9, 0.8])) is None
    assert galaxy_and_cluster(np.array([0.5, np.inf]), np.array([0.9, 0.9])) is None


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Ellipses and round objects in turn; four photographs of each of 18 places."""
    folder = tmp_path_factory.mktemp("sky")
    write_sky(folder, count=72, kinds=(0, 7))
    return deep_sky.load(folder)


def test_photographs_of_one_object_are_on_one_side(sky):
    assert sky.targets.tolist() == [0, 2] * 36  # galaxies and globular clusters
    train, test = SPLITS["random"](sky, 0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(72))
    assert {i % 18 for i in train.tolist()}.isdisjoint(i % 18 for i in test.tolist())
    plain = dataclasses.replace(sky, groups=torch.arange(72))  # the control
    train, test = SPLITS["random"](plain, 0)
    assert not {i % 18 for i in train.tolist()}.isdisjoint(i % 18 for i in test.tolist())


def test_deep_sky_is_learned_at_all_angles(sky):
    create = partial(deep_sky.network, "test_d4resnet")
    result = real_training.run(real_training.Row(create, size=33, epochs=25), deep_sky.TASK, sky, "random", 0)
    assert result["drift"] < 1e-5
    assert result["views"] == result["averaged"] * 8
    oblique = result["oblique"]["averaged"]
    assert len(oblique) == len(deep_sky.TASK.angles)
    assert min(accuracy for accuracy, _ in [*result["averaged"], *oblique]) > 70  # one class for all: 50


def test_a_disc_is_rotated_counter_clockwise():
    image = torch.zeros(1, 3, 66, 66)
    image[..., 28:38, 50:60] = 1  # to the right
    quarter = deep_sky.posed(image, 90)
    torch.testing.assert_close(quarter, deep_sky.posed(image, 0).rot90(1, (2, 3)), atol=1e-4, rtol=0)
    assert quarter[0, 0, :16, 12:20].max() > 0.9
    assert deep_sky.posed(torch.ones(1, 3, 66, 66), 30)[0, 0, 0, 0] == -1


def test_results_are_added_once(cells, monkeypatch, tmp_path):
    task = dataclasses.replace(solar_cells.TASK, rows={"plain ResNet": row("test_c1resnet"), "D4 ResNet": None})
    monkeypatch.setattr(real_data, "RESULTS", tmp_path / "real.json")
    monkeypatch.setattr(real_data, "TASKS", {"solar-cells": task})
    monkeypatch.setattr(solar_cells, "elpv", lambda: cells)
    monkeypatch.setattr(sys, "argv", ["real_data.py", "--rows", "plain ResNet", "--seeds", "0", "1"])
    real_data.main()
    assert (tmp_path / "real.png").stat().st_size > 1000
    text = (tmp_path / "real.md").read_text()
    assert "| plain ResNet | 33 | 99,287 |" in text
    assert "Not run: D4 ResNet." in text
    monkeypatch.setattr(real_data, "run", None)  # nothing is trained again
    real_data.main()
    results = real_data.load_results()["solar-cells"]
    assert set(results["runs"]["plain ResNet"]) == {"random 0", "random 1"}
    assert len(results["test images"]["random 1"].split()) == 98  # strata of 50: 12
