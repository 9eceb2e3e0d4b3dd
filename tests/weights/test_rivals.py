"""A checkpoint of one model, read as another with the same names and shapes, is told by its statistics and refused."""

import pytest
import timm
import torch
from support.reference_data import checkpoint

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.images.photographs import draw_crops, load_photographs
from equivision_timm.layers import ConvNormAct
from equivision_timm.weights.equivision import convert_file as convert_file_module
from equivision_timm.weights.equivision import rivals as rivals_module
from equivision_timm.weights.equivision.convert import _entries_of, convert_original, fitting_models
from equivision_timm.weights.equivision.convert_file import convert_file
from equivision_timm.weights.equivision.rivals import check_before_search, check_statistics
from equivision_timm.weights.equivision.sign_groups import known_patterns, sign_groups
from equivision_timm.weights.equivision.signs import apply_signs
from equivision_timm.weights.folder import read_provenance

pytest.importorskip("skimage", reason="photographs come with scikit-image, the extra `convert`")
SIZE = 33  # n = 1 mod 32
RIVAL = {"c8resnet18_fast": "d4resnet18_fast", "d4resnet18_fast": "c8resnet18_fast"}


@pytest.fixture(scope="module")
def photographs():
    return load_photographs(None)


def original(name, photographs, signs=None):
    """A checkpoint of the original whose running statistics are those of its activations on photographs."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    modules = {key: module for key, module in model.named_modules() if isinstance(module, ConvNormAct)}
    stored = {key: module.conv.weight.detach().clone() for key, module in modules.items()}
    with torch.no_grad():
        if signs:
            apply_signs(model, stored, signs)
        for module in modules.values():
            module.norm.per_field.weight.uniform_(0.3, 0.7)
            module.norm.per_field.bias.normal_(0, 0.1)
            module.norm.per_field.momentum = 1.0
        model.train()(draw_crops(photographs, 30, SIZE, seed=9))
    state = model.state_dict() | {f"{key}.conv.weight": weight for key, weight in stored.items()}
    return {theirs: state[entry.ours].reshape(entry.shape) for theirs, entry in _entries_of(name).items() if entry.ours}


@pytest.fixture(scope="module")
def originals(photographs):
    return {
        "c8resnet18_fast": original("c8resnet18_fast", photographs),
        "d4resnet18_fast": original("d4resnet18_fast", photographs, known_patterns("d4")["scipy1.9-avx2"]),
    }


@pytest.fixture
def small_crops(monkeypatch):
    """Crops of 33 pixels in place of 97: the same answers in a fraction of the time."""
    monkeypatch.setattr(
        convert_file_module, "draw_crops", lambda photographs, **kw: draw_crops(photographs, size=SIZE, **kw)
    )


def test_seven_pairs_share_names_and_shapes():
    pairs = {name for name in timm.list_models("c8resnet*") if name.replace("c8", "d4") in timm.list_models()}
    for name in pairs:
        state = {
            key: torch.empty(entry.shape, device="meta") for key, entry in _entries_of(name).items() if entry.needed
        }
        assert fitting_models(state, name) == [name.replace("c8", "d4")]
    assert len(pairs) >= 6


@pytest.mark.parametrize("name", RIVAL)
def test_the_wrong_model_is_refused_and_the_right_one_named(tmp_path, originals, name, small_crops):
    path, rival = tmp_path / "x.ckpt", RIVAL[name]
    torch.save(originals[name], path)
    with pytest.raises(ValueError, match=f"this is no checkpoint of {rival}: .* fit {name}.*: convert it as {name}"):
        convert_file(path, rival, tmp_path / "out")
    if rival.startswith("d4"):  # signs that the user gives make it no D4 network
        with pytest.raises(ValueError, match=f"convert it as {name}"):
            convert_file(path, rival, tmp_path / "out", signs="scipy1.11-avx2")
    assert list(tmp_path.iterdir()) == [path]


def test_the_right_model_is_written(tmp_path, originals, small_crops):
    """Positive control."""
    name = "c8resnet18_fast"
    torch.save(originals[name], tmp_path / "x.ckpt")
    report = convert_file(tmp_path / "x.ckpt", name, tmp_path / "out")
    assert report.statistics.rms < 0.1
    assert report.statistics.leads[RIVAL[name]] > 10
    assert float(read_provenance(tmp_path / "out")[f"better_than_{RIVAL[name]}"].split()[0]) > 10


def test_signs_of_no_known_machine_are_not_taken_for_the_other_group(photographs):
    """A D4 network with random signs: no known pattern fits, but C8 must not be said to."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(2, (len(sign_groups("d4")),), generator=generator).tolist()
    state = original("d4resnet18_fast", photographs, "".join("-" if bit else "+" for bit in bits))
    crops = draw_crops(photographs, size=SIZE)
    d4, c8 = (convert_original(state, name) for name in ("d4resnet18_fast", "c8resnet18_fast"))
    check_before_search("d4resnet18_fast", d4, {"c8resnet18_fast": c8}, crops)
    with pytest.raises(ValueError, match="fit d4resnet18_fast"):
        check_statistics("c8resnet18_fast", c8, {"d4resnet18_fast": d4}, crops)


def test_random_weights_are_said_to_be_of_no_model(photographs):
    """In none of the two directions: C8 has a small lead over D4 whatever the truth is."""
    state = checkpoint("c8resnet18_fast", seed=3)  # of seeds 0 to 3 the one with the largest lead
    weights = {name: convert_original(state, name) for name in RIVAL}
    for name, rival in RIVAL.items():
        with pytest.raises(ValueError, match="do not tell which"):
            check_statistics(name, weights[name], {rival: weights[rival]}, draw_crops(photographs, size=SIZE))


def test_trained_weights_are_never_taken_for_the_other_model(photographs):
    """Trained on digits and looked at on photographs, which is far off: the right model, or none."""
    names, crops = ("test_c8resnet", "test_d4resnet"), draw_crops(photographs, size=SIZE)
    weights = {name: timm.create_model(name, pretrained=True).state_dict() for name in names}
    c8, d4 = names
    assert check_statistics(c8, weights[c8], {d4: weights[c8]}, crops).leads[d4] > 3
    for truth, wrong in ((c8, d4), (d4, c8)):
        with pytest.raises(ValueError, match=f"do not tell which|fit {truth}"):
            check_statistics(wrong, weights[truth], {truth: weights[truth]}, crops)


def test_a_lead_alone_is_not_enough(monkeypatch, photographs):
    """Control: without the second condition a small difference on many fields decides."""
    state = checkpoint("c8resnet18_fast")
    weights = {name: convert_original(state, name) for name in RIVAL}
    monkeypatch.setattr(rivals_module, "Z_LIMIT", 1.0)
    for clearly, message in ((0.8, "do not tell which"), (1.0, "fit c8resnet18_fast")):
        monkeypatch.setattr(rivals_module, "CLEARLY", clearly)
        with pytest.raises(ValueError, match=message):
            check_statistics(
                "d4resnet18_fast",
                weights["d4resnet18_fast"],
                {"c8resnet18_fast": weights["c8resnet18_fast"]},
                draw_crops(photographs, size=SIZE),
            )


def test_statistics_that_tell_nothing(tmp_path, photographs, small_crops):
    """Random statistics fit neither: refused, unless the user vouches for the group by its signs."""
    name = "d4resnet18_fast"
    torch.save(checkpoint(name), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"do not tell which \(.* standard errors on 40 crops"):
        convert_file(tmp_path / "x.ckpt", RIVAL[name], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = convert_file(tmp_path / "x.ckpt", name, tmp_path / "out", signs="scipy1.11-avx2")
    assert report.statistics.rms > 0.2


def test_activations_that_overflow(tmp_path, small_crops):
    state = checkpoint("c4resnet18_fast")
    torch.save({**state, "conv1.weights": torch.full_like(state["conv1.weights"], 3e38)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not finite on photographs"):
        convert_file(tmp_path / "x.ckpt", "c4resnet18_fast", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_photographs(tmp_path, originals, monkeypatch):
    """Where two models share names and shapes, photographs are needed; elsewhere the report says what was left out."""
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    torch.save(originals["c8resnet18_fast"], tmp_path / "x.ckpt")
    with pytest.raises(ModuleNotFoundError, match="--images DIR"):
        convert_file(tmp_path / "x.ckpt", "c8resnet18_fast", tmp_path / "out")
    torch.save(checkpoint("c4resnet18_fast"), tmp_path / "y.ckpt")
    report = convert_file(tmp_path / "y.ckpt", "c4resnet18_fast", tmp_path / "out")
    assert report.statistics is None
    assert "not compared: no photographs" in str(report)
