"""The search for signs: networks whose batch-norm statistics were computed on photographs under a pattern we know.

The statistics come from 10 crops, one of each photograph, and the search sees 9 of them: as little noise as a hundred
crops would leave, in a fraction of the time. Without any in common, see `test_other_photographs`.
"""

import copy

import pytest
import timm
import torch

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.images.photographs import draw_crops, load_crops, load_photographs
from equivision_timm.layers import ConvNormAct
from equivision_timm.weights.equivision import signs as signs_module
from equivision_timm.weights.equivision.sign_groups import half_turn, irrep_flips, known_patterns, sign_groups
from equivision_timm.weights.equivision.signs import (
    MOST_BATCHES,
    Z_LIMIT,
    AmbiguousSigns,
    apply_signs,
    combine,
    find_signs,
    statistics_misfit,
)

pytest.importorskip("skimage", reason="photographs come with scikit-image, the extra `convert`")

SIZE = 33  # n = 1 mod 32
NARROW = {"d4": 8, "d8": 6}


def conv_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvNormAct)}


def coefficients(model):
    return {name: module.conv.weight.detach().clone() for name, module in conv_norms(model).items()}


@torch.no_grad()
def trained_elsewhere(name, pattern, crops, seed=0, **options):
    """(A network with the coefficients of a checkpoint from a machine with `pattern`, the true network).

    The true network computed its running statistics on `crops`; the first one shares all but its signs.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name, **options)
    for module in conv_norms(model).values():
        module.norm.per_field.weight.uniform_(0.3, 0.7)
        module.norm.per_field.bias.normal_(0, 0.1)
        module.norm.per_field.momentum = 1.0
    stored = coefficients(model)
    truth = copy.deepcopy(model)
    apply_signs(truth, stored, pattern)
    truth.train()(crops)
    model.load_state_dict({k: v for k, v in truth.state_dict().items() if not k.endswith("conv.weight")}, strict=False)
    return model.eval(), truth.eval()


def random_pattern(group, seed):
    bits = torch.randint(2, (len(sign_groups(group)),), generator=torch.Generator().manual_seed(seed))
    return "".join("-" if bit else "+" for bit in bits.tolist())


@torch.no_grad()
def difference(model, truth, pattern):
    """Largest difference of the logits to the true ones at an exact size, in standard deviations."""
    found = copy.deepcopy(model)
    apply_signs(found, coefficients(model), pattern)
    x = load_crops(None, 2, 97)
    expected = truth(x)
    return ((found(x) - expected).abs().max() / expected.std()).item()


def check_found(model, truth, pattern, crops, restarts):
    search = find_signs(model, crops, restarts)
    assert search.signs in (pattern, combine(pattern, half_turn(model.group)))
    assert difference(model, truth, search.signs) < 1e-3
    assert search.separation >= Z_LIMIT
    assert search.misfit < search.runner_up_misfit
    assert search.logits_differ > 0.01
    assert difference(model, truth, search.runner_up) > 0.01  # negative control: the runner-up is another network
    return search


_D4, _D8 = (list(known_patterns(group)) for group in ("d4", "d8"))
KNOWN = [*(("d4", name) for name in _D4), ("d8", _D8[0])]
KNOWN += [pytest.param("d8", name, marks=pytest.mark.slow) for name in _D8[1:]]


@pytest.mark.parametrize(("group", "name"), KNOWN)
def test_known_patterns(group, name):
    pattern, crops = known_patterns(group)[name], load_crops(None, 10, SIZE)
    model, truth = trained_elsewhere(f"{group}resnet18", pattern, crops, width=NARROW[group])
    search = check_found(model, truth, pattern, crops[:9], restarts=0)
    assert search.name == name
    assert min(search.known, key=search.known.get) == name
    others = [misfit for other, misfit in search.known.items() if other != name]
    assert min(others) > 2 * search.misfit


@pytest.mark.parametrize("group", ["d4", "d8"])
def test_random_signs(group):
    pattern, crops = random_pattern(group, seed=1), load_crops(None, 10, SIZE)
    model, truth = trained_elsewhere(f"{group}resnet18", pattern, crops, width=NARROW[group])
    search = check_found(model, truth, pattern, crops[:9], restarts=0)
    assert search.name is None


def test_full_size():
    """The published width: d4resnet18 as it is."""
    pattern, crops = known_patterns("d4")["scipy1.11-avx512"], load_crops(None, 10, SIZE)
    model, truth = trained_elsewhere("d4resnet18", pattern, crops)
    search = check_found(model, truth, pattern, crops[:9], restarts=0)
    assert search.name == "scipy1.11-avx512"


def test_the_half_turn_changes_nothing():
    crops = load_crops(None, 8, SIZE)
    for group, width in NARROW.items():
        model, truth = trained_elsewhere(f"{group}resnet18", "+" * len(half_turn(group)), crops, width=width)
        assert difference(model, truth, half_turn(group)) < 1e-4
        others = [flip for flip in irrep_flips(group) if flip != half_turn(group)]
        assert difference(model, truth, others[0]) > 0.01  # other irreps do matter


def test_statistics_that_fit_no_pattern_are_refused():
    """Half of the fields from one network, half from another: nothing reproduces them, and nothing is chosen."""
    crops = load_crops(None, 8, SIZE)
    first, second = list(known_patterns("d4").values())[:2]
    model, _ = trained_elsewhere("d4resnet18", first, crops, width=8)
    _, other = trained_elsewhere("d4resnet18", second, crops, width=8)
    for name, module in conv_norms(model).items():
        theirs = conv_norms(other)[name].norm.per_field.running_var
        module.norm.per_field.running_var[::2] = theirs[::2]
    with pytest.raises(AmbiguousSigns, match=r"standard errors apart \(3 are needed\)") as raised:
        find_signs(model, crops, restarts=0)
    for part in (first, second, "scipy1.11-avx2", "--signs", "--images"):
        assert part in str(raised.value)


def test_other_photographs():
    """Statistics from some photographs, the search on others: the right pattern, or none, but never a wrong one."""
    crops = load_crops(None, 20, SIZE)
    seen = torch.arange(20) % 10 % 2 == 1  # the photographs take turns
    pattern = known_patterns("d4")["scipy1.9-avx2"]
    model, truth = trained_elsewhere("d4resnet18", pattern, crops[~seen], seed=1, width=8)
    try:
        search = find_signs(model, crops[seen], restarts=0)
    except AmbiguousSigns as refusal:
        message = str(refusal)
    else:
        message = search.signs
        assert difference(model, truth, search.signs) < 1e-3
    assert pattern in message


def test_more_crops_settle_what_few_leave_open():
    """Few crops refuse the right pattern, more of the same photographs settle it: as many as needed, no more."""
    photographs = load_photographs(None)
    pattern = known_patterns("d4")["scipy1.11-avx2"]
    model, truth = trained_elsewhere("d4resnet18", pattern, draw_crops(photographs, 200, SIZE, seed=99), width=8)
    few = draw_crops(photographs, 20, SIZE)
    with pytest.raises(AmbiguousSigns, match="cannot be told on 20 crops") as raised:
        find_signs(model, few, restarts=0)
    assert pattern in str(raised.value)
    taken = []

    def more():
        for seed in range(1, 100):
            taken.append(seed)
            yield draw_crops(photographs, 20, SIZE, seed=seed)

    search = find_signs(model, few, restarts=0, more=more())
    assert search.signs == pattern
    assert difference(model, truth, search.signs) < 1e-3
    assert search.separation >= Z_LIMIT
    assert search.crops in (20 * len(taken), 20 * (len(taken) + 1))
    assert 20 < search.crops <= 20 * MOST_BATCHES


def test_more_crops_do_not_make_a_wrong_pattern_right(monkeypatch):
    """Half of the statistics from another network: refused on all crops, too, and the limit holds."""
    crops = load_crops(None, 8, SIZE)
    first, second = list(known_patterns("d4").values())[:2]
    model, _ = trained_elsewhere("d4resnet18", first, crops, width=8)
    _, other = trained_elsewhere("d4resnet18", second, crops, width=8)
    for name, module in conv_norms(model).items():
        theirs = conv_norms(other)[name].norm.per_field.running_var
        module.norm.per_field.running_var[::2] = theirs[::2]
    monkeypatch.setattr(signs_module, "MOST_BATCHES", 4)
    monkeypatch.setattr(signs_module, "_descend", lambda scorer, pattern: pattern)  # the known patterns will do
    photographs, taken = load_photographs(None), []
    more = (taken.append(seed) or draw_crops(photographs, 8, SIZE, seed=seed) for seed in range(1, 1000))
    with pytest.raises(AmbiguousSigns, match="cannot be told on 32 crops"):
        find_signs(model, crops, restarts=0, more=more)
    assert len(taken) == 3


def test_groups_without_signs():
    with pytest.raises(ValueError, match="same on every machine"):
        find_signs(timm.create_model("test_c8resnet"), torch.zeros(1, 3, 33, 33))


def test_statistics_misfit_leaves_the_model_alone():
    crops = load_crops(None, 8, SIZE)
    model, truth = trained_elsewhere("d4resnet18", "+" * 24, crops, width=8)
    before = copy.deepcopy(truth.state_dict())
    residuals = statistics_misfit(truth, crops)
    assert set(residuals) == set(conv_norms(model))
    assert max(r.abs().max() for r in residuals.values()) < 1e-3  # the very crops
    assert all(torch.equal(value, before[key]) for key, value in truth.state_dict().items())
    assert not truth.training
