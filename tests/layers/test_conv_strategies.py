"""Every strategy computes what the definition, 'expand', computes; and the faster forms never meet old numbers."""

import copy
import json
import pickle
import resource

import pytest
import timm
import torch
import torch.nn as nn
from cases import GROUPS
from hypothesis import example, given, settings
from hypothesis import strategies as st

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.kernel_bases import Kernel, load_irreps_basis, load_kernel_basis
from equivision_timm.layers import ConvNorm, SteerableConv2d
from equivision_timm.layers.conv import _equal
from equivision_timm.layers.conv_strategies import auto, block_diagonal, native, native_library
from equivision_timm.layers.conv_strategies.irreps import block_weights
from equivision_timm.testing import assert_equivariant, equivariance_error

# Largest error relative to the largest output, against the definition in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


FAST = {"block_diagonal": block_diagonal, "native": native}
LACKS = native_library.why_not()  # of this machine
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
NAMES = ["block_diagonal", pytest.param("native", marks=needs_native)]
fast = pytest.mark.parametrize("strategy", NAMES)


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
    group=st.sampled_from(GROUPS),
    kernel_size=st.sampled_from((1, 3)),
    stride=st.sampled_from((1, 2, 3)),
    dilation=st.sampled_from((1, 2, 3)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13)),
    fields=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@example("c8", 1, 1, 1, (3, 70, 71), (2, 3), "contiguous")  # more pixels than are worked on at a time
@example("d4", 1, 2, 1, (2, 141, 140), (1, 2), "channels-last")
@example("c4", 3, 1, 1, (5, 40, 40), (2, 1), "contiguous")
@example("d8", 3, 2, 1, (3, 90, 91), (1, 1), "contiguous")
def test_equals_the_definition(strategy, group, kernel_size, stride, dilation, shape, fields, layout):
    batch, height, width = shape
    expand, quick = pair(strategy, group, kernel_size, *fields, stride=stride, dilation=dilation)
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
def test_one_wrong_number_is_noticed(strategy):
    expand, block = pair(strategy, "c8", 3)
    x = torch.randn(1, 24, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        assert relative(block(x), expand(x)) < 1e-12
        block.weight[1, 2, 7, 0] += 0.1
        assert relative(block(x), expand(x)) > 1e-4


@fast
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gradcheck(strategy, group, kernel_size):
    _, layer = pair(strategy, group, kernel_size, 1, 2, stride=2)
    x = torch.randn(2, layer.order, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        weights = block_weights(weight, group, kernel_size)
        return FAST[strategy].conv2d(x, weights, bias, group, kernel_size, 2, 1)

    assert torch.autograd.gradcheck(function, (x, layer.weight, bias), fast_mode=True)


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
@pytest.mark.parametrize("kernel_size", [1, 3])
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


@fast
def test_compiling_changes_no_strategy(strategy):
    _, block = pair(strategy, "c8", 3)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    torch.compile(block, fullgraph=True, backend=backend)(torch.randn(2, 24, 9, 9, dtype=torch.float64))
    assert [target for target in targets if "conv2d" in target] == [f"equivision_timm.{strategy}_conv2d.default"]


@fast
def test_the_operator_is_registered_correctly(strategy):
    _, layer = pair(strategy, "d4", 3, 1, 1)
    weights = block_weights(layer.weight, "d4", 3).detach().requires_grad_()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(FAST[strategy].conv2d, (x, weights, None, "d4", 3, 1, 1), test_utils=tests)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_fewer_products(group, kernel_size):
    basis = load_irreps_basis(Kernel(group, kernel_size))
    order = len(basis.fourier)
    size = {"c1": 1, "d1": 2, "c4": 6, "d4": 12, "c8": 14, "d8": 28}[group]  # sum over blocks of copies * size^2
    assert basis.products == size * (1 if kernel_size == 1 else 6)
    assert basis.products <= order**2 * kernel_size**2
    dimension = load_kernel_basis(Kernel(group, kernel_size)).coefficients.shape[0]
    assert torch.linalg.matrix_rank(basis.coefficients) == dimension  # no kernel is lost


# What is chosen


def test_unknown_strategy():
    names = "'auto', 'expand', 'block_diagonal', 'native'"
    with pytest.raises(ValueError, match=f"unknown conv_strategy 'fft': use one of {names}"):
        SteerableConv2d(1, 1, 3, "c4", strategy="fft")
    with pytest.raises(ValueError, match="needs regular fields, but the input of this layer is trivial"):
        SteerableConv2d(3, 1, 7, "c4", "trivial", strategy="block_diagonal")


@needs_native
def test_auto_follows_the_machine():
    wide, cpu = SteerableConv2d(100, 100, 3, "c8"), torch.device("cpu")
    shape = (8, 800, 14, 14)
    assert wide.strategy_for(shape, cpu) == wide.strategy_for(shape, cpu, torch.float64) == "native"
    assert wide.strategy_for(shape, cpu, torch.bfloat16) == "block_diagonal"
    assert wide.strategy_for(shape, torch.device("cuda")) == "expand"


def test_auto_follows_the_shape(monkeypatch):
    monkeypatch.setattr(native_library, "_available", lambda: False)  # no compiler
    wide, narrow = SteerableConv2d(100, 100, 3, "c8"), SteerableConv2d(1, 1, 3, "c8")
    cpu = torch.device("cpu")
    assert wide.strategy_for((8, 800, 14, 14), cpu) == "block_diagonal"
    assert narrow.strategy_for((8, 8, 14, 14), cpu) == "expand"
    assert SteerableConv2d(70, 70, 3, "c1").strategy_for((8, 70, 56, 56), cpu) == "expand"
    assert auto.choose((1, 800, 7, 7), cpu, torch.float32, 100, 100, 1, 1, "c8") == "block_diagonal"


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


# What is kept between calls


def unit(strategy, **kwargs):
    layer = ConvNorm(3, 2, 3, "c4", **kwargs)
    layer.conv.strategy = strategy
    x = torch.randn(4, 12, 9, 9)
    layer.train()(x)
    return layer.eval(), x


def separately(layer, x):
    """Convolution by the definition, then norm: nothing is folded or kept with gradients."""
    strategy, layer.conv.strategy = layer.conv.strategy, "expand"
    with torch.enable_grad():
        y = layer(x).detach()
    layer.conv.strategy = strategy
    return y


CHANGES = {
    "in place": lambda layer: layer.conv.weight.mul_(2),
    "data": lambda layer: layer.conv.weight.data.mul_(2),
    "data replaced": lambda layer: setattr(layer.conv.weight, "data", layer.conv.weight.data * 2),
    "one number": lambda layer: layer.conv.weight.data.view(-1)[3:4].add_(1),
    "the last number": lambda layer: layer.conv.weight.data.view(-1)[-1:].add_(1),
    "new parameter": lambda layer: setattr(layer.conv, "weight", nn.Parameter(layer.conv.weight * 2)),
    "loaded": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "assigned": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, assign=True),
    "norm weight": lambda layer: layer.norm.per_field.weight.data.mul_(2),
    "norm bias": lambda layer: layer.norm.per_field.bias.data.add_(1),
    "mean": lambda layer: layer.norm.per_field.running_mean.add_(1),
    "variance": lambda layer: layer.norm.per_field.running_var.mul_(2),
    "epsilon": lambda layer: setattr(layer.norm.per_field, "eps", 0.5),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strategy", ["expand", *NAMES])
def test_no_old_filter_after(change, strategy):
    layer, x = unit(strategy)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(before, separately(layer, x), rtol=1e-4, atol=1e-5)
        CHANGES[change](layer)
        after = layer(x)
    assert not torch.equal(after, before)
    atol = 1e-2 if "bfloat16" in change else 1e-5  # the two forms of the basis are rounded each by itself
    torch.testing.assert_close(after, separately(layer, x), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("numbers", [1 << 14, (1 << 14) + 1])  # whole words of 64 bits, or not
@pytest.mark.parametrize("start", [0, 1])
def test_one_number_among_many_is_noticed(dtype, numbers, start):
    tensor = torch.randn(numbers + start).to(dtype)[start:]
    kept = [tensor.clone()]
    assert _equal((tensor,), kept)
    for place in (0, numbers // 2, numbers - 1):
        changed = tensor.clone()
        changed[place] += 1
        assert not _equal((changed,), kept)
        tensor.data[place] += 1
        assert not _equal((tensor,), kept)
        tensor.copy_(kept[0])


@pytest.mark.parametrize("strategy", ["expand", *NAMES])
def test_the_filter_is_made_once(strategy, monkeypatch):
    layer, x = unit(strategy)
    made = []
    original = ConvNorm._fuse
    monkeypatch.setattr(ConvNorm, "_fuse", lambda self, weight: made.append(1) or original(self, weight))
    with torch.no_grad():
        results = [layer(x) for _ in range(3)]
    assert len(made) == 1
    assert torch.equal(results[0], results[2])
    with torch.no_grad():
        layer.double()(x.double())
        layer.float()(x)
    assert len(made) == 3


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_nothing(copier):
    layer, x = unit("block_diagonal")
    with torch.inference_mode():
        expected = layer(x)
    other = copier(layer)
    assert other.conv._packed.kept is None
    with torch.no_grad():
        torch.testing.assert_close(other(x), expected)
        other.conv.weight.mul_(2)
        assert not torch.allclose(other(x), expected)
        torch.testing.assert_close(layer(x), expected)


def test_hooks_inside_see_what_passes():
    layer, x = unit("block_diagonal")
    seen = []
    handle = layer.conv.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with torch.no_grad():
        hooked = layer(x)
        handle.remove()
        torch.testing.assert_close(layer(x), hooked, rtol=1e-4, atol=1e-5)
    assert seen == [(4, 8, 9, 9)]


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
