"""The search over all sign patterns: networks whose statistics were computed under a pattern that is known here."""

import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file
from support.equivision_data import mixed_statistics, random_pattern, to_equivision, trained_elsewhere

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.data import draw_crops, load_crops, load_photographs
from equivision_timm.weights.signs import combine, half_turn
from equivision_timm.weights.statistics import Z_LIMIT, AmbiguousSigns

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from find_signs import MOST_BATCHES, find_signs, main

pytest.importorskip("skimage", reason="photographs come with scikit-image, the extra `convert`")


@pytest.mark.parametrize("group", ["d4", pytest.param("d8", marks=pytest.mark.slow)])
def test_random_signs_are_found(group):
    pattern, crops = random_pattern(group, seed=1), load_crops(None, 10, 33)
    model, _ = trained_elsewhere("test_d4resnet", pattern, crops, group=group, width=8)
    found = find_signs(model, [crops[:9]], restarts=0)
    assert found.signs in (pattern, combine(pattern, half_turn(group)))
    assert found.name is None
    assert found.separation >= Z_LIMIT
    assert found.misfits[0] < found.misfits[1]
    assert found.logits_differ > 0.01


def test_statistics_that_fit_no_pattern_are_refused():
    """Half of the fields from one network, half from another."""
    crops = load_crops(None, 8, 33)
    with pytest.raises(AmbiguousSigns, match="standard errors"):
        find_signs(mixed_statistics(crops), [crops], restarts=0)


@pytest.mark.slow
def test_the_script(tmp_path, monkeypatch, capsys):
    """Other crops than those of the statistics: as many batches as it takes."""
    photographs, pattern = load_photographs(None), random_pattern("d4", seed=2)
    model, _ = trained_elsewhere("d4resnet18_fast", pattern, draw_crops(photographs, 200, 97, seed=99))
    save_file(to_equivision(model.state_dict()), tmp_path / "x.safetensors")
    monkeypatch.setattr("sys.argv", ["find_signs.py", str(tmp_path / "x.safetensors"), "--model", "d4resnet18_fast"])
    main()
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["signs"] in (pattern, combine(pattern, half_turn("d4")))
    assert 40 <= int(printed["crops"]) <= 40 * MOST_BATCHES


def test_groups_without_signs():
    with pytest.raises(ValueError, match="c8"):
        find_signs(timm.create_model("test_c8resnet"), [])
