"""scripts/real_data.py on generated cells: splits, exactness with a plain network as the control, resumed results."""

import sys
from functools import partial

import pytest
import real_data
import timm
import torch


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
    return real_data.Data(images.clamp(0, 255).to(torch.uint8), targets, strata)


def row(name, **arguments):
    return real_data.Row(partial(real_data.scratch, name), size=33, epochs=3, **arguments)


def test_a_random_split_is_stratified(cells):
    train, test = real_data.SPLITS["random"](cells.strata, 0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(400))
    assert cells.strata[test].bincount().tolist() == (cells.strata.bincount() / 4).round().tolist()
    assert not torch.equal(test, real_data.SPLITS["random"](cells.strata, 1)[1])


def test_a_block_is_a_module_away_from_training():
    """Within a wafer's files no training image is nearer than a module; in a random split most are (the control)."""
    strata = torch.tensor([0, 4]).repeat_interleave(500)[
        torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    ]

    def nearest(split):
        train, test = real_data.SPLITS[split](strata, 3)
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
    runs = {
        name: real_data.run(row(name, moved=False), cells, "random", 0) for name in ("test_d4resnet", "test_c1resnet")
    }
    exact, plain = runs.values()
    assert exact["drift"] < 1e-5
    assert exact["views"] == [exact["averaged"]] * 8
    assert exact["averaged"][0] > 85  # all sound: 75
    assert plain["drift"] > 0.1
    assert plain["views"][0][0] > plain["views"][1][0] + 5


@pytest.mark.parametrize("training", [{"epochs": 0}, {"epochs": 2, "layer_decay": 0.85}], ids=["frozen", "fine-tuned"])
def test_a_pretrained_network_is_fitted_and_exact(cells, monkeypatch, training):
    monkeypatch.setattr(real_data, "lite0", lambda: timm.create_model("test_efficientnet").eval())
    result = real_data.run(real_data.Row(real_data.pretrained, size=33, **training), cells, "random", 0)
    assert result["drift"] < 1e-4
    assert result["averaged"][1] > 60  # random features
    assert len({tuple(view) for view in result["views"]}) > 1  # of the backbone


def test_scores():
    logits, targets = torch.tensor([-2.0, -1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1 / 3, 2 / 3])
    assert real_data.scores(logits, targets) == [50.0, 62.5]  # pairs: right, right, wrong, a tie


def test_results_are_added_once(cells, monkeypatch, tmp_path):
    monkeypatch.setattr(real_data, "RESULTS", tmp_path / "real.json")
    monkeypatch.setattr(real_data, "elpv", lambda: cells)
    monkeypatch.setattr(real_data, "ROWS", {"plain ResNet": row("test_c1resnet"), "D4 ResNet": None})
    monkeypatch.setattr(sys, "argv", ["real_data.py", "--rows", "plain ResNet", "--seeds", "0", "1"])
    real_data.main()
    assert (tmp_path / "real.png").stat().st_size > 1000
    assert "| plain ResNet | 33 | 99,287 |" in (tmp_path / "real.md").read_text()
    monkeypatch.setattr(real_data, "run", None)  # nothing is trained again
    real_data.main()
    assert set(real_data.load_results()["runs"]["plain ResNet"]) == {"random 0", "random 1"}
    assert len(real_data.load_results()["test images"]["random 1"].split()) == 98  # strata of 50: 12
