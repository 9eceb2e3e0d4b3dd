"""Every strategy computes what the definition, 'expand', computes; and can be asked for by name."""

import copy
import json
import resource

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import GROUPS

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.irreps_basis import load_irreps_basis
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto, native_library, register
from equivision_timm.layers.strategies.basis import block_counts
from equivision_timm.layers.strategies.expand import Expand
from equivision_timm.testing import assert_equivariant, equivariance_error

# Largest error relative to the largest output, against the definition in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

CPU = torch.device("cpu")
USUAL = Layer(Kernel("c8", 3), 1, 1)
LACKS = native_library.why_not()  # of this machine
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
    for name, strategy in STRATEGIES.items()
    if name != "expand"
    for reason in [strategy.supports(USUAL)]
]
fast = pytest.mark.parametrize("strategy", NAMES)
MORE_GROUPS = (*GROUPS, "c3", "c6", "c16")


def loses(strategy, layer):
    """Whether `strategy` cannot compute a layer, and says so."""
    reason = STRATEGIES[strategy].supports(layer.describe(CPU, torch.float32))
    if reason:
        with pytest.raises(ValueError, match="cannot"):
            layer.check_strategy(strategy)
    return bool(reason)


def pair(strategy, group, kernel_size, in_fields=3, out_fields=2, dtype=torch.float64, **kwargs):
    """The same layer as 'expand' and as `strategy`."""
    layer = SteerableConv2d(in_fields, out_fields, kernel_size, group, strategy="expand", dtype=dtype, **kwargs)
    other = copy.deepcopy(layer)
    other.strategy = strategy
    return layer, other


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(layer, x, weights):
    x = x.detach().requires_grad_()
    y = layer(x)
    return (y, *torch.autograd.grad((y * weights).sum(), (x, layer.weight)))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@fast
@settings(max_examples=120, deadline=None)
@given(
    group=st.sampled_from(MORE_GROUPS),
    kernel=st.sampled_from(((1, False), (3, False), (5, False), (5, True), (7, False), (3, True))),
    stride=st.sampled_from((1, 2, 3)),
    dilation=st.sampled_from((1, 2, 3)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13)),
    fields=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@example("c8", (1, False), 1, 1, (3, 70, 71), (2, 3), "contiguous")  # more pixels than are worked on at a time
@example("d4", (1, False), 2, 1, (2, 141, 140), (1, 2), "channels-last")
@example("c4", (3, False), 1, 1, (5, 40, 40), (2, 1), "contiguous")
@example("d8", (3, False), 2, 1, (3, 90, 91), (1, 1), "contiguous")
@example("c4", (5, True), 1, 1, (2, 40, 41), (2, 1), "contiguous")
def test_equals_the_definition(strategy, group, kernel, stride, dilation, shape, fields, layout):
    batch, height, width = shape
    kwargs = {"stride": stride, "dilation": dilation, "low_pass": kernel[1]}
    expand, quick = pair(strategy, group, kernel[0], *fields, **kwargs)
    if loses(strategy, expand):
        return
    x = LAYOUTS[layout](torch.randn(batch, fields[0] * expand.order, height, width, dtype=torch.float64))
    weights = torch.randn(expand(x).shape, dtype=torch.float64)
    exact = gradients(expand, x, weights)
    for dtype in (torch.float64, torch.float32):
        for found, expected in zip(gradients(quick.to(dtype), x.to(dtype), weights.to(dtype)), exact, strict=True):
            assert found.shape == expected.shape
            assert relative(found, expected) < 3 * TOLERANCE[dtype]
        with torch.inference_mode():
            assert relative(quick(x.to(dtype)), exact[0]) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize(("strategy", "sizes"), [("expand", 4), ("block_diagonal", 4), ("native", 3)])
def test_kernels_that_are_known(strategy, sizes):
    """So that the test above is not empty."""
    if LACKS and strategy == "native":
        pytest.skip(LACKS)
    layers = [SteerableConv2d(1, 1, size, "c6") for size in (1, 3, 5, 7)]
    assert sum(not loses(strategy, layer) for layer in layers) == sizes


@fast
def test_one_wrong_number_is_noticed(strategy):
    expand, block = pair(strategy, "c8", 3)
    x = torch.randn(1, 24, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        assert relative(block(x), expand(x)) < 1e-12
        block.weight[1, 2, 7, 0] += 0.1
        assert relative(block(x), expand(x)) > 1e-4


@fast
@pytest.mark.parametrize("group", MORE_GROUPS)
@pytest.mark.parametrize("kernel", [(1, False), (3, False), (5, True)])
def test_gradcheck(strategy, group, kernel):
    _, layer = pair(strategy, group, kernel[0], 1, 2, stride=2, low_pass=kernel[1])
    x = torch.randn(2, layer.order, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return STRATEGIES[strategy].conv2d(x, weight, layer.describe(CPU, torch.float64))

    assert torch.autograd.gradcheck(function, (x, layer.weight), fast_mode=True)


@fast
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradients_that_nobody_needs(strategy, frozen):
    expand, block = pair(strategy, "d4", 3)
    x = torch.randn(2, 24, 7, 7, dtype=torch.float64, requires_grad=frozen != "x")
    found = []
    for layer in (expand, block):
        layer.weight.requires_grad_(frozen != "weight")
        found += torch.autograd.grad(layer(x).pow(2).sum(), layer.weight if frozen == "x" else x)
    torch.testing.assert_close(*found)


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", ["c4", "d8"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_low_precision(strategy, group, kernel_size, dtype):
    expand, block = pair(strategy, group, kernel_size, 8, 8)
    x = torch.randn(2, 8 * expand.order, 12, 12, dtype=torch.float64)
    weights = torch.randn(expand(x).shape, dtype=torch.float64)
    exact = gradients(expand, x, weights)
    for found, expected in zip(gradients(block.to(dtype), x.to(dtype), weights.to(dtype)), exact, strict=True):
        assert found.dtype == dtype
        assert relative(found.double(), expected) < TOLERANCE[dtype]
    block = block.float()
    with torch.autocast("cpu", dtype):
        y = block(x.float())
    assert y.dtype == dtype
    assert relative(y.double(), exact[0]) < TOLERANCE[dtype]


@fast
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_equivariant(strategy, group, kernel_size, stride):
    _, layer = pair(strategy, group, kernel_size, dtype=torch.float32, stride=stride)
    arguments = {"group": group, "input_type": "regular", "output_type": "regular", "in_channels": 3 * layer.order}
    assert_equivariant(layer, 17, tolerance=1e-5, **arguments)


@fast
def test_a_symmetry_it_lacks_is_not_there(strategy):
    _, layer = pair(strategy, "c4", 3, 2, 1, dtype=torch.float32)  # 4 channels out, 8 in: also a field of d4
    arguments = {"input_type": "trivial", "output_type": "invariant", "in_channels": 8}
    model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert equivariance_error(model, 17, group="d1", **arguments)[1] > 1e-3


@fast
def test_threads_change_nothing_and_stay_as_many(strategy):
    expand, block = pair(strategy, "c8", 3)
    x = torch.randn(7, 24, 50, 50, dtype=torch.float64)
    weights = torch.randn(7, 16, 50, 50, dtype=torch.float64)
    threads = torch.get_num_threads()
    expected = gradients(expand, x, weights)
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            for a, b in zip(gradients(block, x, weights), expected, strict=True):
                assert relative(a, b) < 1e-12
            with torch.inference_mode():
                assert relative(block(x), expected[0]) < 1e-12
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


@fast
def test_no_images(strategy):
    _, block = pair(strategy, "c4", 3)
    x = torch.zeros(0, 12, 9, 9, dtype=torch.float64, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == (0, 8, 9, 9)
    assert not block.weight.grad.any()


@fast
def test_meta_tensors_have_the_right_shape(strategy):
    _, block = pair(strategy, "c4", 3, stride=2)
    assert block.to("meta")(torch.zeros(2, 12, 9, 8, dtype=torch.float64, device="meta")).shape == (2, 8, 5, 4)


@fast
def test_compiles_as_one_graph(strategy):
    _, block = pair(strategy, "c8", 3)
    x, weights = torch.randn(2, 24, 9, 9, dtype=torch.float64), torch.randn(2, 16, 9, 9, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled, x, weights), gradients(block, x, weights), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("strategy", ["expand", *NAMES])
def test_compiling_changes_no_strategy(strategy):
    _, block = pair(strategy, "c8", 3)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(graph.graph.nodes)
        return graph

    torch.compiler.reset()
    torch.compile(block, fullgraph=True, backend=backend)(torch.randn(2, 24, 9, 9, dtype=torch.float64))
    own = [node for node in nodes if "equivision_timm" in str(node.target)]
    found = [str(node.args[-1]) if "kernel_basis" in str(node.target) else str(node.target) for node in own]
    expected = {
        "expand": ["pixels"],
        "block_diagonal": ["blocks", "lifting", "fourier"],
        "native": ["equivision_timm.native_conv2d.default"],
    }
    assert found == expected[strategy]


@needs_native
def test_the_operator_is_registered_correctly():
    weight = pair("native", "d4", 3, 1, 1)[1].weight.detach().requires_grad_()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.equivision_timm.native_conv2d.default
    torch.library.opcheck(operator, (x, weight, "d4-3-regular", 1, 1), test_utils=tests)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_fewer_products(group, kernel_size):
    basis = load_irreps_basis(Kernel(group, kernel_size))
    order = len(basis.fourier)
    size = {"c1": 1, "d1": 2, "c4": 6, "d4": 12, "c8": 14, "d8": 28}[group]  # sum over blocks of copies * size^2
    per_pair, _ = block_counts(f"{group}-{kernel_size}-regular")
    assert per_pair == size * (1 if kernel_size == 1 else 6)
    assert per_pair <= order**2 * kernel_size**2
    dimension = load_kernel_basis(Kernel(group, kernel_size)).coefficients.shape[0]
    assert torch.linalg.matrix_rank(basis.coefficients) == dimension  # no kernel is lost


# What is chosen


def test_unknown_strategy():
    with pytest.raises(ValueError, match="fft"):
        SteerableConv2d(1, 1, 3, "c4", strategy="fft")
    for name in ("block_diagonal", "native"):
        with pytest.raises(ValueError, match="trivial"):
            SteerableConv2d(3, 1, 7, "c4", "trivial", strategy=name)


@needs_native
def test_what_native_does_not_know():
    with pytest.raises(ValueError, match="7 x 7"):
        SteerableConv2d(1, 1, 7, "c4", strategy="native")
    reason = STRATEGIES["native"].supports(SteerableConv2d(1, 1, 3, "c4").describe(torch.device("cuda"), torch.float32))
    assert "cuda" in reason


@needs_native
def test_auto_follows_the_machine():
    wide, shape = SteerableConv2d(100, 100, 3, "c8"), (8, 800, 14, 14)
    assert wide.strategy_for(shape, CPU) == wide.strategy_for(shape, CPU, torch.float64) == "native"
    assert wide.strategy_for(shape, CPU, torch.bfloat16) == "block_diagonal"
    assert wide.strategy_for(shape, torch.device("cuda")) == "expand"
    assert SteerableConv2d(9, 9, 7, "c8").strategy_for((8, 72, 14, 14), CPU) != "native"
    plain = [SteerableConv2d(512, 512, size, "c1").strategy_for((2, 512, 5, 5), CPU) for size in (1, 3)]
    assert plain == ["expand", "native"]  # 1 x 1 kernels of the trivial group save no product


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native_library, "why_not", lambda: "no compiler")
    auto.decide.cache_clear()
    yield
    auto.decide.cache_clear()


@pytest.mark.usefixtures("without_native")
def test_auto_without_compiled_code():
    wide, narrow = SteerableConv2d(100, 100, 3, "c8"), SteerableConv2d(1, 1, 3, "c8")
    assert wide.strategy_for((8, 800, 14, 14), CPU) == "block_diagonal"
    assert narrow.strategy_for((8, 8, 14, 14), CPU) == "expand"
    assert SteerableConv2d(70, 70, 3, "c1").strategy_for((8, 70, 56, 56), CPU) == "expand"
    assert SteerableConv2d(512, 512, 3, "c1").strategy_for((2, 512, 5, 5), CPU) == "expand"  # it has no blocks
    assert SteerableConv2d(100, 100, 1, "c8").strategy_for((1, 800, 7, 7), CPU) == "block_diagonal"


@pytest.fixture
def outside():
    """Another strategy, as somebody else would write it."""

    class Halves(Expand):
        name = "halves"
        factor = 1.0

        def supports(self, layer):
            return "it is only for even groups" if layer.order % 2 else None

        def conv2d(self, x, weight, layer):
            return 2 * super().conv2d(x / 2, weight, layer) * self.factor

    yield register(Halves)
    del STRATEGIES["halves"]


def test_another_strategy_is_one_class(outside, monkeypatch):
    model = timm.create_model("test_c8resnet", conv_strategy="halves").eval()
    assert set(model.conv_strategies(65).values()) == {"expand", "halves"}
    x, found = torch.randn(2, 3, 65, 65), {}
    for name in ("expand", "halves"):
        model.set_conv_strategy(name)
        with torch.no_grad():
            found[name] = model(x)
    torch.testing.assert_close(found["halves"], found["expand"], rtol=1e-4, atol=1e-5)
    test_equals_the_definition.hypothesis.inner_test("halves", "c4", (3, False), 1, 1, (1, 5, 5), (2, 3), "contiguous")
    monkeypatch.setattr(outside, "factor", 1.001)  # the control
    with pytest.raises(AssertionError):
        test_equals_the_definition.hypothesis.inner_test(
            "halves", "c4", (3, False), 1, 1, (1, 5, 5), (2, 3), "contiguous"
        )
    with pytest.raises(ValueError, match="even"):
        SteerableConv2d(1, 1, 3, "c3", strategy="halves")
    with pytest.raises(ValueError, match="halves"):
        register(outside)


def test_a_strategy_that_left_is_unknown():
    assert "halves" not in STRATEGIES
    with pytest.raises(ValueError, match="halves"):
        SteerableConv2d(1, 1, 3, "c4", strategy="halves")


def test_strategies_of_a_model_travel_as_json(tmp_path):
    model = timm.create_model("test_c8resnet", conv_strategy="block_diagonal").eval()
    chosen = model.conv_strategies(size=65)
    assert set(chosen.values()) == {"expand", "block_diagonal"}
    assert [name for name, value in chosen.items() if value == "expand"] == ["conv1.conv"]  # the image
    (tmp_path / "strategies.json").write_text(json.dumps(chosen))
    loaded = json.loads((tmp_path / "strategies.json").read_text())
    other = timm.create_model("test_c8resnet", conv_strategy=loaded).eval()
    assert other.conv_strategies(size=65) == chosen
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected = other(x)
        for strategy in ("expand", "auto", "block_diagonal", *([] if LACKS else ["native"])):
            model.set_conv_strategy(strategy)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_a_wrong_strategy_changes_nothing():
    model = timm.create_model("test_c8resnet", conv_strategy="expand")
    before = [m.strategy for m in model.modules() if isinstance(m, SteerableConv2d)]
    wrong = (
        {"layer1.0.conv1.conv": "block_diagonal", "layer9.conv": "expand"},
        {"conv1.conv": "block_diagonal"},
        "fft",
    )
    for strategy in wrong:
        with pytest.raises(ValueError, match="conv_strategy"):
            model.set_conv_strategy(strategy)
    assert [m.strategy for m in model.modules() if isinstance(m, SteerableConv2d)] == before


@fast
def test_memory_does_not_grow(strategy):
    _, block = pair(strategy, "c8", 3, 8, 8, dtype=torch.float32)
    x = torch.randn(4, 64, 28, 28)

    def steps(number):
        for _ in range(number):
            block(x).pow(2).mean().backward()
            block.zero_grad()
            with torch.no_grad():
                block(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB, on Linux

    before = steps(40)
    assert steps(200) - before < 20
