"""Checkpoints of equivision: every form in which they occur, and those that do not fit."""

import pytest
import timm
import torch
from support.equivision_data import buffers, convolutions, with_buffers
from support.reference_data import checkpoint, networks

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.kernels import Kernel
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.weights.equivision import convert_original, translate
from equivision_timm.weights.signs import element_signs, known_patterns

NAME, D4 = "c4resnet18_fast", "d4resnet18_fast"
EVERY = ("filter", "sampled_basis", "indices")


def close(found, expected, rtol=1e-4):
    return found.keys() == expected.keys() and all(
        torch.allclose(found[key], value, rtol=rtol, atol=1e-5) for key, value in expected.items()
    )


@pytest.mark.parametrize(
    ("name", "kinds"), [*((NAME, (kind,)) for kind in EVERY), ("d1resnet18_fast", EVERY), ("c8resnet18_fast", EVERY)]
)
def test_buffers_change_nothing_if_the_bases_agree(name, kinds):
    state = checkpoint(name)
    assert close(convert_original(with_buffers(name, state, kinds=kinds), name), convert_original(state, name))


def test_buffers_of_every_network_are_known():
    """Names that are neither needed nor ignored would be left over."""
    keys = [key.split("block_expansion")[0].rsplit(".", 1)[-1] for name in networks() for key in buffers(name)]
    parts = {key.rstrip("0123456789") for key in keys}
    assert parts == {"filter", "", "in_indices_", "out_indices_", "indices_"}  # "": of sampled_basis


@pytest.mark.parametrize("name", [D4, "d8resnet18_fast"])
@pytest.mark.parametrize("kind", ["filter", "sampled_basis"])
def test_a_basis_with_other_signs_is_translated(name, kind):
    """Whatever the signs of the machine of the training, the converted network has its filters."""
    state = checkpoint(name)
    group = convolutions(name)["conv1.weights"].group
    pattern = list(known_patterns(group).values())[1]
    found = convert_original(with_buffers(name, state, pattern, (kind,)), name)
    expected = convert_original(state, name, pattern)
    assert close(found, expected)
    if kind == "sampled_basis":  # a translation by signs is exact
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_basis_in_any_other_frame_is_translated():
    state = with_buffers(D4, checkpoint(D4), kinds=("sampled_basis",))
    generator = torch.Generator().manual_seed(0)
    for key, value in list(state.items()):
        if "sampled_basis" in key:
            change = torch.linalg.qr(torch.randn(len(value), len(value), generator=generator))[0]
            weights = key.split("_basisexpansion")[0] + "weights"
            state[key] = torch.einsum("ab,b...->a...", change, value)
            state[weights] = (state[weights].view(-1, len(value)) @ change.T).flatten()
    assert close(convert_original(state, D4), convert_original(checkpoint(D4), D4), rtol=1e-3)


def test_signs_negate_their_elements():
    pattern = known_patterns("d4")["scipy1.11-avx512"]
    plain, signed = convert_original(checkpoint(D4), D4), convert_original(checkpoint(D4), D4, pattern)
    signs = element_signs(Kernel("d4", 3), pattern)[:, 0]
    assert (signs < 0).nonzero().flatten().tolist() == [*range(4, 12), 36, 38, 40, 42]
    key = "layer2.0.conv2.conv.weight"
    assert torch.equal(signed[key], plain[key] * signs[:, None])
    assert torch.equal(signed[key], convert_original(checkpoint(D4), D4, "scipy1.11-avx512")[key])
    assert torch.equal(signed["conv1.conv.weight"], plain["conv1.conv.weight"])


@pytest.mark.parametrize(
    ("dtype", "kinds"), [(torch.float16, EVERY), (torch.bfloat16, ("filter",)), (torch.float64, ("sampled_basis",))]
)
def test_other_dtypes_become_float32(dtype, kinds):
    state = with_buffers(D4, checkpoint(D4), kinds=kinds)
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    expected, found = convert_original(state, D4), convert_original(cast, D4)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 0.05 * value.abs().max(), key


@pytest.mark.parametrize(
    ("changes", "noun"),
    [
        ({"bn1.batch_norm_[8].weight": torch.zeros(16)}, "Unexpected key"),
        ({"fc.bias": torch.zeros(999)}, "size mismatch"),
        ({"layer1.0.conv1.weights": torch.zeros(3)}, "shape"),
        ({"layer4.1.conv2.weights": None}, "missing"),
        ({"layer4.1.bn2.batch_norm_[4].bias": None}, "missing"),
        ({"conv1.filter": torch.randn(64, 3, 7, 7)}, "group"),
        (
            {"conv1._basisexpansion.block_expansion_('irrep_0', 'regular').sampled_basis": torch.ones(18, 4, 1, 49)},
            "group",
        ),
        ({"fc.bias": torch.full((1000,), float("nan"))}, "NaN"),
        ({"fc.bias": torch.full((1000,), 1e300, dtype=torch.float64)}, "infinity"),
        ({"conv1.weights": torch.ones(864, dtype=torch.int64)}, "integers"),
        ({"bn1.batch_norm_[4].running_var": -torch.ones(16)}, "variances"),
    ],
)
def test_entries_that_do_not_fit(changes, noun):
    state = {key: value for key, value in {**checkpoint(NAME), **changes}.items() if value is not None}
    with torch.device("meta"):
        model = timm.create_model(NAME)
    with pytest.raises(RuntimeError, match=noun):
        model.load_state_dict(convert_original(state, NAME), assign=True)


@pytest.mark.parametrize(("name", "kinds"), [(NAME, ("filter",)), (D4, ("filter", "sampled_basis"))])
def test_a_filter_that_contradicts_the_coefficients(name, kinds):
    state = with_buffers(name, checkpoint(name), kinds=kinds)
    key = "layer1.0.conv1.weights"
    noise = torch.zeros_like(state[key])
    noise[7] = 0.1 * state[key].abs().max()  # one of 1152 coefficients
    for changes in (
        {"layer1.0.conv1.filter": state["layer1.0.conv2.filter"]},
        {key: state[key] + noise},
        {key: 2 * state[key]},
    ):
        with pytest.raises(WeightsError, match="filter"):
            convert_original({**state, **changes}, name)


def test_another_group_of_the_same_order_is_noticed_by_its_filters():
    state = with_buffers("c8resnet18_fast", checkpoint("c8resnet18_fast"), kinds=("filter",))
    with pytest.raises(WeightsError, match="group"):
        convert_original(state, D4)


def test_signs_that_do_not_apply():
    with pytest.raises(ValueError, match="signs"):
        convert_original(checkpoint(NAME), NAME, "+-")
    with pytest.raises(WeightsError, match="signs"):
        convert_original(with_buffers(D4, checkpoint(D4)), D4, "scipy1.11-avx2")
    state = with_buffers(D4, checkpoint(D4), kinds=("sampled_basis",))
    del state["conv1._basisexpansion.block_expansion_('irrep_0,0', 'regular').sampled_basis"]
    with pytest.raises(WeightsError, match="sampled_basis of some"):
        convert_original(state, D4)


def test_bases_leave_nothing_to_choose():
    """With its basis, a D4 checkpoint needs no photographs, and is not compared with C8."""
    found = translate(with_buffers(D4, checkpoint(D4), "scipy1.9-avx2"), D4)
    assert found.notes["basis_from"] == "sampled_basis"
    assert "signs" not in found.notes
    assert close(found.state_dict, convert_original(checkpoint(D4), D4, "scipy1.9-avx2"))


def test_weights_that_overflow_are_refused():
    state = checkpoint(NAME)
    with pytest.raises(WeightsError, match="overflow"):
        translate({**state, "conv1.weights": state["conv1.weights"] * 1e37}, NAME)
