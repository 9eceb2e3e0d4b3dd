"""Conversion of original checkpoints: every form in which they occur, and every way in which they do not fit."""

import gzip
import json
from pathlib import Path

import pytest
import timm
import torch
from support.reference_data import checkpoint, networks

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies.expand import expand_filter
from equivision_timm.weights.equivision.convert import _entries_of, _plain, convert_original, convert_with_details
from equivision_timm.weights.equivision.sign_groups import element_signs, known_patterns

DATA = Path(__file__).parents[1] / "data" / "original_buffers.json.gz"


def buffers(name):
    """{name: shape} of what an original network holds besides its published weights: filters, bases, index tables."""
    return json.loads(gzip.decompress(DATA.read_bytes()))[name]


def steerable(name):
    """{name of the coefficients in the original: our convolution} of a model whose weights do not matter."""
    with torch.device("meta"):
        model = timm.create_model(name)
    convs = [module for module in model.modules() if isinstance(module, SteerableConv2d)]
    originals = [key for key in networks()[name]["state_dict"] if key.endswith(".weights")]
    return dict(zip(originals, convs, strict=True))


def with_buffers(name, state, signs=None, kinds=("filter", "sampled_basis", "indices")):
    """`state` as an original network in eval mode would save it, its basis signed by the pattern `signs`."""
    state = dict(state)
    for key, conv in steerable(name).items():
        basis = load_kernel_basis(conv.kernel).sample().float()
        if signs:
            pattern = element_signs(conv.group, signs)
            basis = basis * pattern[f"{conv.group}/{conv.kernel_size}x{conv.kernel_size}/{conv.input_type}"].view(
                -1, 1, 1, 1, 1
            )
        prefix = key.removesuffix("weights")
        for other, shape in buffers(name).items():
            if other == f"{prefix}filter" and "filter" in kinds:
                state[other] = expand_filter(state[key].view(conv.weight.shape), basis)
                assert list(state[other].shape) == shape
            elif other.startswith(f"{prefix}_basisexpansion") and "sampled_basis" in kinds:
                state[other] = basis.flatten(3)
                assert list(state[other].shape) == shape
    if "indices" in kinds:
        state |= {key: torch.zeros(shape) for key, shape in buffers(name).items() if "indices" in key}
    return state


@pytest.mark.parametrize("name", networks())
def test_every_entry_of_every_original_network_has_a_place(name):
    published, others = networks()[name]["state_dict"], buffers(name)
    entries = _entries_of(name)
    assert {_plain(key): tuple(shape) for key, shape in {**published, **others}.items()} == {
        key: entry.shape for key, entry in entries.items()
    }
    assert {key for key, entry in entries.items() if entry.needed} == set(published)


@pytest.mark.parametrize("name", ["c1resnet18", "d1resnet18_fast", "c4resnet18_fast", "c8resnet50_fast"])
@pytest.mark.parametrize(
    "kinds", [("filter",), ("sampled_basis",), ("indices",), ("filter", "sampled_basis", "indices")]
)
def test_buffers_change_nothing_where_the_basis_is_ours(name, kinds):
    state = checkpoint(name)
    expected = convert_original(state, name)
    found = convert_with_details(with_buffers(name, state, kinds=kinds), name)
    assert found.basis == (
        "+".join(k for k in kinds if k == "sampled_basis") or {"filter": "filter"}.get(kinds[0], "canonical")
    )
    for key, value in expected.items():
        assert torch.allclose(found.state_dict[key], value, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["d4resnet18_fast", "d8resnet18_fast"])
@pytest.mark.parametrize("kind", ["filter", "sampled_basis"])
def test_a_foreign_basis_is_translated(name, kind):
    """Whatever the signs of the author's machine, the converted network has the author's filters."""
    state = checkpoint(name)
    group = steerable(name)["conv1.weights"].group
    for pattern in known_patterns(group).values():
        theirs = with_buffers(name, state, pattern, (kind,))
        found = convert_with_details(theirs, name)
        expected = convert_original(state, name, pattern)
        assert found.basis == kind
        assert found.residual < 1e-5
        for key, value in expected.items():
            assert torch.allclose(found.state_dict[key], value, rtol=1e-4, atol=1e-5), key
        if kind == "sampled_basis":  # a translation by signs is exact
            assert all(torch.equal(found.state_dict[key], value) for key, value in expected.items())


def test_a_basis_in_any_other_frame_is_translated():
    """Not signs only: a random invertible change of basis."""
    name = "d4resnet18_fast"
    state = with_buffers(name, checkpoint(name), kinds=("sampled_basis",))
    expected = convert_original(checkpoint(name), name)
    generator = torch.Generator().manual_seed(0)
    for key, value in list(state.items()):
        if "sampled_basis" in key:
            change = torch.linalg.qr(torch.randn(len(value), len(value), generator=generator))[0]
            weights = key.split("_basisexpansion")[0] + "weights"
            state[key] = torch.einsum("ab,b...->a...", change, value)
            state[weights] = (state[weights].view(-1, len(value)) @ change.T).flatten()
    found = convert_with_details(state, name)
    assert found.residual < 1e-5
    assert all(torch.allclose(found.state_dict[key], v, rtol=1e-3, atol=1e-5) for key, v in expected.items())


def test_signs_negate_what_they_name():
    name, pattern = "d4resnet18_fast", known_patterns("d4")["scipy1.11-avx512"]
    plain, signed = convert_original(checkpoint(name), name), convert_original(checkpoint(name), name, pattern)
    signs = element_signs("d4", pattern)["d4/3x3/regular"]
    assert (signs < 0).nonzero().flatten().tolist() == [*range(4, 12), 36, 38, 40, 42]
    key = "layer2.0.conv2.conv.weight"
    assert torch.equal(signed[key], plain[key] * signs[:, None])
    assert torch.equal(signed[key], convert_original(checkpoint(name), name, "scipy1.11-avx512")[key])
    assert torch.equal(signed["conv1.conv.weight"], plain["conv1.conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32_and_are_reported(dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in checkpoint("c4resnet18_fast").items()}
    conversion = convert_with_details(state, "c4resnet18_fast")
    assert conversion.dtypes == (str(dtype).removeprefix("torch."),)
    assert {v.dtype for v in conversion.state_dict.values()} == {torch.float32, torch.int64}
    assert torch.equal(conversion.state_dict["fc.bias"], state["fc.bias"].float())


def test_the_input_stays_untouched():
    state = checkpoint("c4resnet18_fast")
    converted = convert_original(state, "c4resnet18_fast")
    converted["fc.bias"].zero_()
    assert state["fc.bias"].abs().max() > 0


def edited(**changes):
    state = {**checkpoint("c4resnet18_fast"), **changes}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.bias": None}, r"1 entries are missing \(fc.bias\)"),
        ({"extra.weight": torch.zeros(1)}, r"1 do not belong to it \(extra.weight\)"),
        ({"bn1.batch_norm_[8].weight": torch.zeros(16)}, "do not belong"),
        ({"fc.bias": torch.zeros(999)}, r"fc.bias has shape \(999,\), but c4resnet18_fast needs \(1000,\)"),
        ({"conv1.weights": torch.zeros(863)}, "conv1.weights has shape"),
        ({"conv1.weights": torch.zeros(16, 3, 18)}, "conv1.weights has shape"),
        ({"bn1.indices_4": torch.zeros(3)}, "bn1.indices_4 has shape"),
        ({"conv1.filter": torch.randn(64, 3, 7, 7)}, "outside the basis"),
        (
            {"conv1._basisexpansion.block_expansion_('irrep_0', 'regular').sampled_basis": torch.randn(18, 4, 1, 49)},
            "outside",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convert_original(edited(**changes), "c4resnet18_fast")


@pytest.mark.parametrize("name", ["c4resnet18_fast", "d4resnet18_fast"])
@pytest.mark.parametrize("kinds", [("filter",), ("filter", "sampled_basis")])
def test_a_filter_that_contradicts_the_coefficients_is_refused(name, kinds):
    state = with_buffers(name, checkpoint(name), kinds=kinds)
    convert_original(state, name)
    key = "layer1.0.conv1.weights"
    noise = torch.zeros_like(state[key])
    noise[7] = 0.1 * state[key].abs().max()  # one of 1152 coefficients
    scrambled = state[key] * torch.tensor([1.0, 1.0, -1.0]).repeat(len(noise) // 3)  # no signs of a basis
    other = state["layer1.0.conv2.filter"]
    for changes in (
        {"layer1.0.conv1.filter": other},
        {key: state[key] + noise},
        {key: 2 * state[key]},
        {key: scrambled},
    ):
        with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weights and the filter beside it disagree"):
            convert_original({**state, **changes}, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("filter",), ("sampled_basis",), ("filter", "sampled_basis")])
def test_half_precision_rounds_and_does_not_contradict(dtype, kinds):
    name = "d4resnet18_fast"
    state = with_buffers(name, checkpoint(name), kinds=kinds)
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    expected, found = convert_original(state, name), convert_original(half, name)
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 0.05 * value.abs().max(), key


IMPOSSIBLE = [
    (
        {"fc.bias": torch.full((1000,), 1e300, dtype=torch.float64)},
        r"fc.bias holds .*1e\+300 .*beyond the range of float32",
    ),
    ({"conv1.weights": torch.full((864,), -1e39, dtype=torch.float64)}, "conv1.weights holds .* beyond the range"),
    ({"fc.bias": torch.full((1000,), float("nan"))}, "fc.bias holds values from nan"),
    ({"fc.bias": torch.ones(1000, dtype=torch.complex64)}, "fc.bias is of type complex64, where floating-point"),
    ({"conv1.weights": torch.ones(864, dtype=torch.int64)}, "conv1.weights is of type int64"),
    ({"bn1.batch_norm_[4].bias": torch.ones(16, dtype=torch.bool)}, "bias is of type bool"),
    ({"fc.bias": torch.ones(1000).to(torch.float8_e4m3fn)}, "fc.bias is of type float8_e4m3fn"),
    ({"bn1.batch_norm_[4].running_var": -torch.ones(16)}, "running_var holds values from -1 to -1, and variances"),
    ({"bn1.batch_norm_[4].num_batches_tracked": torch.tensor(-1)}, "num_batches_tracked holds values from -1 .* count"),
    ({"bn1.batch_norm_[4].num_batches_tracked": torch.tensor(1.5)}, "num_batches_tracked holds values from 1.5"),
    ({"bn1.batch_norm_[4].num_batches_tracked": torch.tensor(1j)}, "num_batches_tracked holds complex numbers"),
    ({"bn1.indices_4": torch.tensor([0, -4])}, "bn1.indices_4 holds"),
    ({"conv1.weights": torch.zeros(864)}, "conv1.weights is zero everywhere"),
    ({"conv1.weights": torch.full((864,), 1e-60, dtype=torch.float64)}, "conv1.weights is zero everywhere"),
    ({"conv1.filter": torch.zeros(64, 3, 7, 7)}, "conv1.filter is zero everywhere"),
    ({"conv1._basisexpansion.sampled_basis": torch.zeros(18, 4, 1, 49)}, "sampled_basis is zero everywhere"),
    ({"fc.weight": torch.zeros(1000, 128)}, "fc.weight is zero everywhere"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_values_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        convert_original(edited(**changes), "c4resnet18_fast")
    assert "\n" not in str(raised.value)


def test_a_basis_that_does_not_span_the_kernels_is_refused():
    name = "c4resnet18_fast"
    state = with_buffers(name, checkpoint(name), kinds=("sampled_basis",))
    key = next(key for key in state if key.startswith("layer2.0.conv1._basis"))
    for damaged in (state[key][:1].expand_as(state[key]), torch.cat([state[key][:-1], state[key][:1]])):
        with pytest.raises(ValueError, match=r"sampled_basis of layer2\.0\.conv1\.weights has .* independent ones"):
            convert_original({**state, key: damaged}, name)
    twice = {**state, key.replace("irrep", "x"): state[key], "layer2.0.conv1._basisexpansion.sampled_basis": state[key]}
    with pytest.raises(ValueError, match="two entries for"):
        convert_original(twice, name)


def test_the_error_names_the_model_that_fits():
    with pytest.raises(
        ValueError, match=r"it fits d4resnet18_fast or c8resnet18_fast|c8resnet18_fast or d4resnet18_fast"
    ):
        convert_original(checkpoint("c8resnet18_fast"), "c8resnet18")


def test_another_group_of_the_same_order_is_seen_by_its_basis():
    """d4 and c8 checkpoints have the same names and shapes; a basis or a filter tells them apart."""
    state = with_buffers("c8resnet18_fast", checkpoint("c8resnet18_fast"), kinds=("filter",))
    with pytest.raises(ValueError, match="another group"):
        convert_original(state, "d4resnet18_fast")


def test_signs_where_there_are_none_to_choose():
    with pytest.raises(ValueError, match="same on every machine"):
        convert_original(checkpoint("c4resnet18_fast"), "c4resnet18_fast", "+-")
    name = "d4resnet18_fast"
    with pytest.raises(ValueError, match="carries its basis"):
        convert_original(with_buffers(name, checkpoint(name)), name, "scipy1.11-avx2")
    with pytest.raises(ValueError, match="no sign pattern of d4"):
        convert_original(checkpoint(name), name, "++--")


def test_a_basis_in_some_convolutions_only_is_refused_where_signs_matter():
    name = "d4resnet18_fast"
    state = with_buffers(name, checkpoint(name), kinds=("sampled_basis",))
    del state["conv1._basisexpansion.block_expansion_('irrep_0,0', 'regular').sampled_basis"]
    with pytest.raises(ValueError, match="some convolutions"):
        convert_original(state, name)
