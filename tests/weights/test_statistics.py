"""Decisions by batch-norm statistics: the signs of D4 and D8 checkpoints, and D4 against C8.

The running statistics come from crops of photographs under known signs; the choice sees other crops, or 9 of 10: as
little noise as a hundred crops would leave, in a fraction of the time.
"""

import copy

import pytest
import torch
from support.equivision_data import mixed_statistics, random_pattern, to_equivision, trained_elsewhere
from support.reference_data import checkpoint, networks
from support.small_models import narrow

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.data import draw_crops, load_crops, load_photographs
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.weights import equivision
from equivision_timm.weights.equivision import same_shapes, translate
from equivision_timm.weights.signs import combine, half_turn, known_patterns, neighbours
from equivision_timm.weights.statistics import Z_LIMIT, AmbiguousSigns, apply_signs, choose_signs

pytest.importorskip("skimage", reason="photographs come with scikit-image, the extra `convert`")
SIZE = 33  # n = 1 mod 32
C8, D4 = "test_c8resnet", "test_d4resnet"


@pytest.fixture(scope="module")
def crops():
    return load_crops(None, 10, SIZE)


@pytest.fixture(scope="module", autouse=True)
def wide_enough():
    with narrow(C8, D4, width=8):
        yield


@torch.no_grad()
def difference(model, truth, pattern):
    """Largest difference of the logits to the true ones at an exact size, in standard deviations."""
    found = copy.deepcopy(model)
    apply_signs(found, pattern)
    x = load_crops(None, 2, 97)
    expected = truth(x)
    return ((found(x) - expected).abs().max() / expected.std()).item()


KNOWN = [("d4", name) for name in known_patterns("d4")] + [("d8", "scipy1.11-avx2")]


@pytest.mark.parametrize(("group", "name"), KNOWN)
def test_known_patterns_are_found(crops, group, name):
    pattern = known_patterns(group)[name]
    model, truth = trained_elsewhere(D4, pattern, crops, group=group)
    before = copy.deepcopy(model.state_dict())
    choice = choose_signs(model, [crops[:9]])
    assert (choice["signs_known_as"], choice["signs"]) == (name, pattern)
    assert float(choice["separation"].split()[0]) >= Z_LIMIT
    assert difference(model, truth, choice["signs"]) < 1e-3
    assert difference(model, truth, choice["runner_up"]) > 0.01  # control: another network
    misfits = {one: float(misfit) for one, misfit in map(str.split, choice["known_misfits"].split(", "))}
    assert min(misfit for other, misfit in misfits.items() if other != name) > 2 * misfits[name]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("group", "nearby"), [("d4", False), ("d4", True), ("d8", True)])
def test_unknown_patterns_are_refused(crops, group, nearby):
    """Random signs, and one sign group beside a known pattern, of little weight: never the nearest known one."""
    known = next(iter(known_patterns(group).values()))
    pattern = combine(known, neighbours(group)[1]) if nearby else random_pattern(group, seed=1)
    model, _ = trained_elsewhere(D4, pattern, crops, group=group)
    with pytest.raises(AmbiguousSigns, match="signs"):
        choose_signs(model, [crops[:9]])


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_the_half_turn_changes_nothing(crops, group):
    model, truth = trained_elsewhere(D4, "+" * len(half_turn(group)), crops, group=group)
    assert difference(model, truth, half_turn(group)) < 1e-4
    others = [move for move in neighbours(group) if move != half_turn(group)]
    assert min(difference(model, truth, move) for move in (others[0], others[-1])) > 0.01


def test_mixed_statistics_are_refused(crops):
    """Half of the fields from one network, half from another; and no more batches are used than there are."""
    with pytest.raises(AmbiguousSigns, match="--signs") as raised:
        choose_signs(mixed_statistics(crops), [crops])
    assert all(name in str(raised.value) for name in known_patterns("d4"))


def test_more_crops_settle_what_few_leave_open():
    """Statistics from four batches: one leaves the signs open, as many are used as it takes, and they are right."""
    photographs, pattern = load_photographs(None), known_patterns("d4")["scipy1.11-avx2"]
    batches = [draw_crops(photographs, 5, SIZE, seed=seed) for seed in range(4)]
    model, _ = trained_elsewhere(D4, pattern, torch.cat(batches))
    with pytest.raises(AmbiguousSigns, match="standard errors"):
        choose_signs(model, batches[:1])
    choice = choose_signs(model, iter([*batches, None]))
    assert choice["signs"] == pattern
    assert choice["separation"].endswith(("on 10 crops", "on 15 crops", "on 20 crops"))


def few_crops(photographs, seed=9):
    return draw_crops(photographs, 20, SIZE, seed=9)


@pytest.fixture(autouse=True)
def few_small_crops(monkeypatch):
    """One batch of small crops in place of 32 batches of 40: the same answers in a hundredth of the time."""
    monkeypatch.setattr(equivision, "draw_crops", lambda *args, **kw: few_crops(*args, **kw)[:18])
    monkeypatch.setattr(equivision, "BATCHES", 1)


def state_of(name, pattern=""):
    """A checkpoint of equivision, as if trained elsewhere."""
    return to_equivision(trained_elsewhere(name, pattern, few_crops(load_photographs(None)))[0].state_dict())


def random_state(name):
    """A checkpoint with random statistics."""
    model, _ = trained_elsewhere(name, "", torch.randn(2, 3, SIZE, SIZE), seed=3)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return to_equivision(model.state_dict())


@pytest.fixture(scope="module")
def originals(wide_enough):
    """Checkpoints of equivision by model."""
    return {C8: state_of(C8), D4: state_of(D4, known_patterns("d4")["scipy1.9-avx2"])}


def test_pairs_that_share_names_and_shapes():
    pairs = {name: same_shapes(name) for name in networks() if same_shapes(name)}
    assert len(pairs) >= 12
    for name, other in pairs.items():
        assert {name[:2], other[:2]} == {"c8", "d4"}
        assert networks()[name]["state_dict"] == networks()[other]["state_dict"]


def test_the_right_model_is_accepted_and_named_for_the_wrong_one(originals):
    notes = translate(originals[C8], C8).notes
    assert float(notes[f"better_than_{D4}"].split()[0]) > 5
    notes = translate(originals[D4], D4).notes
    assert notes["signs_known_as"] == "scipy1.9-avx2"
    assert float(notes[f"better_than_{C8}"].split()[0]) > 5
    for truth, name, signs in ((C8, D4, None), (C8, D4, "scipy1.11-avx2"), (D4, C8, None)):
        with pytest.raises(WeightsError, match=f"convert it as {truth}"):
            translate(originals[truth], name, signs=signs)


def test_unknown_signs_are_not_confused_with_the_other_group():
    state = state_of(D4, random_pattern("d4", 3))
    with pytest.raises(AmbiguousSigns, match="signs"):
        translate(state, D4)
    with pytest.raises(WeightsError, match=rf"do not decide|convert it as {D4}"):
        translate(state, C8)


def test_random_statistics_are_refused(monkeypatch):
    """C8 has a small lead over D4. Signs that the user gives are accepted."""
    with pytest.raises(AmbiguousSigns, match="not clear"):
        translate(random_state(D4), D4)
    assert "signs_given" in translate(random_state(D4), D4, signs="scipy1.11-avx2").notes
    monkeypatch.setattr(equivision, "Z_LIMIT", 0.5)  # the ratio alone refuses it
    with pytest.raises(WeightsError, match="do not decide"):
        translate(random_state(C8), C8)
    monkeypatch.setattr(equivision, "CLEARLY", 1.0)  # control: with both limits lower, a small difference decides
    translate(random_state(C8), C8)


def test_photographs_are_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match="skimage"):
        translate(checkpoint("c4resnet18_fast"), "c4resnet18_fast")
