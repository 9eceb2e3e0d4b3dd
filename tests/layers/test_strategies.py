"""Every strategy computes what the definition, 'expand', computes."""

import copy
import json

import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import GROUPS
from support.results import relative
from torch.utils.flop_counter import FlopCounterMode

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, native_library
from equivision_timm.layers.strategies.auto import decide

# Largest error relative to the largest output, against the definition in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
CPU = torch.device("cpu")
LACKS = native_library.why_not()  # on this machine
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
NAMES = ["block_diagonal", pytest.param("native", marks=needs_native)]
fast = pytest.mark.parametrize("strategy", NAMES)
every = pytest.mark.parametrize("strategy", ["expand", *NAMES])


def pair(strategy, group, kernel_size, in_fields=3, out_fields=2, dtype=torch.float64, **kwargs):
    """The same layer as 'expand' and as `strategy`."""
    layer = SteerableConv2d(in_fields, out_fields, kernel_size, group, strategy="expand", dtype=dtype, **kwargs)
    other = copy.deepcopy(layer)
    other.strategy = strategy
    return layer, other


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
@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from((*GROUPS, "c3", "c6", "c16")),
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
    if strategy == "native" and kernel[0] == 7:
        with pytest.raises(ValueError, match="7 x 7"):
            quick.check_strategy("native")
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


@fast
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("group", ["c4", "d8"])
def test_second_derivatives(strategy, kernel_size, group):
    layer = pair(strategy, group, kernel_size, 1, 2, stride=2)[1]
    x = torch.rand(2, layer.order, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).sin()

    assert torch.autograd.gradgradcheck(function, (x, layer.weight), fast_mode=True)


@fast
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_gradient_only(strategy, frozen):
    x = torch.randn(2, 24, 7, 7, dtype=torch.float64, requires_grad=frozen != "x")
    layers, found = pair(strategy, "d4", 3), []
    for layer in layers:
        layer.weight.requires_grad_(frozen != "weight")
        found += torch.autograd.grad(layer(x).pow(2).sum(), layer.weight if frozen == "x" else x)
    torch.testing.assert_close(*found)
    with torch.no_grad():
        layers[1].weight[1, 1, 7, 0] += 0.1
        assert relative(layers[1](x), layers[0](x)) > 1e-4  # the control: one wrong number


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(strategy, dtype):
    expand, block = pair(strategy, "d8", 3, 8, 8)
    x = torch.randn(2, 128, 12, 12, dtype=torch.float64)
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
def test_threads_change_nothing_and_stay_as_many(strategy):
    expand, block = pair(strategy, "c8", 3)
    x, weights = torch.randn(7, 24, 30, 30, dtype=torch.float64), torch.randn(7, 16, 30, 30, dtype=torch.float64)
    threads = torch.get_num_threads()
    expected = gradients(expand, x, weights)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for a, b in zip(gradients(block, x, weights), expected, strict=True):
                assert relative(a, b) < 1e-12
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


@every
def test_special_shapes(strategy):
    """No image, the meta device, no pixel."""
    _, layer = pair(strategy, "c4", 3, stride=2)
    x = torch.zeros(0, 12, 9, 8, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert not layer.weight.grad.any()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).shape == (0, 8, 5, 4)
            with pytest.raises(ValueError, match="pixels"):
                layer(x.new_zeros(1, 12, 0, 5))
    assert layer.to("meta")(x.new_zeros(2, 12, 9, 8, device="meta")).shape == (2, 8, 5, 4)


@every
def test_compiling_changes_no_strategy(strategy):
    _, layer = pair(strategy, "c8", 3)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x, weights = torch.randn(2, 24, 9, 9, dtype=torch.float64), torch.randn(2, 16, 9, 9, dtype=torch.float64)
    for found, exact in zip(gradients(compiled, x, weights), gradients(layer, x, weights), strict=True):
        torch.testing.assert_close(found, exact)
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


@pytest.mark.parametrize("grad", [True, False])
def test_operations_are_counted_as_those_of_the_dense_convolution(grad):
    for strategy in ("expand", *([] if LACKS else ["native"])):
        layer, x = SteerableConv2d(3, 5, 3, "c8", stride=2, strategy=strategy), torch.rand(2, 24, 9, 9)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            layer(x)
        counts = counter.get_flop_counts()["Global"]
        assert sum(n for op, n in counts.items() if "conv" in str(op)) == 2 * 2 * 5 * 5 * (5 * 8) * (3 * 8) * 9


# Which one runs


def test_strategies_that_cannot_run_here():
    with pytest.raises(ValueError, match="fft"):
        SteerableConv2d(1, 1, 3, "c4", strategy="fft")
    for name in ("block_diagonal", "native"):
        with pytest.raises(ValueError, match="trivial"):
            SteerableConv2d(3, 1, 7, "c4", "trivial", strategy=name)
    layer = SteerableConv2d(1, 1, 3, "c4").describe(torch.device("cuda"), torch.float32)
    assert "cuda" in STRATEGIES["native"].supports(layer)


@needs_native
def test_auto_follows_the_machine(monkeypatch):
    def auto(fields, size, group, *where):
        return SteerableConv2d(fields, fields, size, group).strategy_for((2, fields * int(group[1:]), 9, 9), *where)

    assert auto(100, 3, "c8", CPU) == auto(100, 3, "c8", CPU, torch.float64) == "native"
    assert auto(100, 3, "c8", CPU, torch.bfloat16) == "block_diagonal"
    assert auto(100, 3, "c8", torch.device("cuda")) == "expand"
    assert auto(9, 7, "c8", CPU) != "native"
    assert auto(512, 1, "c1", CPU) == "expand"  # 1 x 1 kernels save no product there
    assert auto(512, 3, "c1", CPU) == "native"
    monkeypatch.setattr(native_library, "why_not", lambda: "no compiler")
    decide.cache_clear()
    assert auto(100, 3, "c8", CPU) == auto(100, 1, "c8", CPU) == "block_diagonal"
    assert auto(1, 3, "c8", CPU) == auto(512, 3, "c1", CPU) == "expand"
    decide.cache_clear()


def test_strategies_of_a_model():
    model = timm.create_model("test_c8resnet", conv_strategy="block_diagonal").eval()
    chosen = model.conv_strategies(size=65)
    assert [name for name, value in chosen.items() if value == "expand"] == ["conv1.conv"]  # the image
    for wrong in ({"layer1.0.conv1.conv": "expand", "layer9.conv": "expand"}, {"conv1.conv": "block_diagonal"}, "fft"):
        with pytest.raises(ValueError, match=r"convolution|strategy"):
            model.set_conv_strategy(wrong)
    assert model.conv_strategies(65) == chosen  # as before
    other = timm.create_model("test_c8resnet", conv_strategy=json.loads(json.dumps(chosen))).eval()
    assert other.conv_strategies(size=65) == chosen
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        expected = other(x)
        for strategy in ("expand", "auto", *([] if LACKS else ["native"])):
            model.set_conv_strategy(strategy)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
