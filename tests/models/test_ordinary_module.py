"""Off the paved road a model is an ordinary PyTorch module: what timm's resnet18 can, ours can, with right values."""

import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath
from timm.utils.model import reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import native_library

LACKS = native_library.why_not()
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
FAST = ["block_diagonal", pytest.param("native", marks=needs_native)]
NAMES = ["resnet18", "test_c8resnet"]  # the control first
# PyTorch's forward mode makes use of what it deprecates
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
X = torch.rand(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))


def create(name="test_c8resnet", **kwargs):
    """A model in eval mode, its norms with other statistics than 0 and 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def both_ways(model):
    """The logits in inference, where steps may be fused, and with gradients, where the tree runs."""
    with torch.no_grad():
        inference = model(X)
    return inference, model(X).detach()


# Derivatives, compared with the definition


@forward_mode
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_transforms(name):
    model = create(name).double()
    x, tangent = X.double(), torch.rand_like(X).double()
    _, found = torch.func.jvp(model, (x,), (tangent,))
    step = 1e-6
    torch.testing.assert_close(
        found, (model(x + step * tangent) - model(x - step * tangent)) / (2 * step), rtol=1e-4, atol=1e-6
    )

    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    direction = {key: torch.randn_like(value) for key, value in parameters.items()}
    gradients = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(list(gradients.values()), list(expected))
    _, slope = torch.func.jvp(lambda p: loss(p, x), (parameters,), (direction,))
    by_gradients = sum((gradients[key] * direction[key]).sum() for key in parameters)
    torch.testing.assert_close(slope, by_gradients)

    each = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(each, model(x))
    jacobian = torch.func.jacrev(lambda image: model(image[None])[0])(x[0])
    (row,) = torch.autograd.grad(model(x.requires_grad_())[0, 3], x)
    torch.testing.assert_close(jacobian[3], row[0])


@forward_mode
@needs_native
def test_a_named_strategy_says_what_it_cannot():
    layer, x = SteerableConv2d(1, 2, 3, "c8", strategy="native"), torch.rand(1, 8, 5, 5)
    for call in (lambda: torch.func.vmap(layer)(x[None]), lambda: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(RuntimeError, match="native"):
            call()


@forward_mode
def test_transforms_of_the_irreps_basis():
    layer, x = SteerableConv2d(1, 2, 3, "d4", stride=2, dtype=torch.float64), torch.rand(2, 8, 5, 5).double()
    found = {}
    for layer.strategy in ("expand", "block_diagonal"):
        each = torch.func.vmap(lambda image: layer(image[None])[0])(x)
        found[layer.strategy] = [each, torch.func.jvp(layer, (x,), (x.sin(),))[1], torch.func.jacrev(layer)(x)]
    torch.testing.assert_close(found["block_diagonal"], found["expand"])


@pytest.mark.parametrize("strategy", FAST)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("group", ["c4", "d8"])
def test_second_derivatives(strategy, kernel_size, group):
    layer = SteerableConv2d(1, 2, kernel_size, group, stride=2, dtype=torch.float64, strategy=strategy)
    x = torch.rand(2, layer.order, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).sin()

    assert torch.autograd.gradgradcheck(function, (x, layer.weight), fast_mode=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of any operator in old-style vmap
@pytest.mark.parametrize("strategy", FAST)
def test_gradient_penalty_and_batched_gradients(strategy):
    found = {}
    for name in ("expand", strategy):
        model = create(conv_strategy=name).double()
        x = X.double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True)
        logits = model(x)[0]
        (rows,) = torch.autograd.grad(logits, x, torch.eye(5, dtype=torch.float64), is_grads_batched=True)
        found[name] = [*(value for value in penalty if value is not None), rows]
    torch.testing.assert_close(found[strategy], found["expand"])
    assert found["expand"][0].abs().max() > 0


@pytest.mark.parametrize("strategy", ["auto", *FAST])
def test_other_weights_and_parametrisations(strategy):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    found = {}
    for name in ("expand", strategy):
        model = create(conv_strategy=name)
        other = {key: value * 1.5 for key, value in model.named_parameters()}
        with torch.no_grad():
            plain = model(X)
            called = torch.func.functional_call(model, other, (X,))
            after = model(X)
        parametrize.register_parametrization(model.layer1[0].conv1.conv, "weight", Doubled())
        found[name] = [plain, called, after, *both_ways(model)]
    torch.testing.assert_close(found[strategy], found["expand"], rtol=1e-4, atol=1e-4)
    assert (found["expand"][0] - found["expand"][1]).abs().max() > 1e-2
    assert (found["expand"][0] - found["expand"][3]).abs().max() > 1e-2


# What reaches C


@needs_native
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_types_must_agree(grad, types):
    for layer in (
        nn.Conv2d(64, 64, 3, dtype=types[0]),
        SteerableConv2d(8, 8, 3, "c8", strategy="native", dtype=types[0]),
    ):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="should be the same"):
            layer(torch.rand(1, 64, 33, 33, dtype=types[1]))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_devices_must_agree(name, grad):
    """Also where weights would be read by C: the meta device stands for every one whose memory a CPU cannot read."""
    ordinary, empty = create(name), create(name).to("meta")
    with torch.set_grad_enabled(grad):
        assert empty(X.to("meta")).shape == (2, 5)
        for model, images in ((empty, X), (ordinary, X.to("meta"))):
            with pytest.raises(RuntimeError, match=r"device"):
                model(images)
        if name != "resnet18":
            ordinary.layer1[0].conv1.norm.to("meta")
            with pytest.raises(RuntimeError, match="is not on the expected device"):
                ordinary(X)


@pytest.mark.parametrize("strategy", ["expand", *FAST])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_no_pixels(strategy, kernel_size):
    layer = SteerableConv2d(1, 1, kernel_size, "c8", strategy=strategy)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="at least 1 x 1 pixels"):
            layer(torch.zeros(1, 8, 0, 5))
        with torch.set_grad_enabled(grad):
            assert layer(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 5, 5)


# What runs in inference is what the tree says


class Doubling(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, *args):
        return 2 * self.inner(*args)


def replace_drop_path(model):
    model.layer1[0].conv2.drop = Doubling()


def subclassed_norm(model):
    norm = model.layer1[0].conv1.norm
    other = BatchNormAct2d(norm.per_field.num_features, act_layer=nn.Sigmoid).eval()
    norm.per_field = other


def wrapped_convolution(model):
    model.layer2[0].conv1.conv = nn.Sequential(model.layer2[0].conv1.conv, nn.Hardtanh(-0.1, 0.1))


def wrapped_unit(model):
    model.layer2[0].conv2 = Doubling(model.layer2[0].conv2)


def patched_forward(path):
    def change(model):
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args: 2 * forward(*args)

    return change


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, inputs, output: 2 * output)


def another_activation(model):
    model.layer1[0].conv1.act = nn.Softplus()


CHANGES = {
    "drop_path": replace_drop_path,
    "norm": subclassed_norm,
    "wrapped conv": wrapped_convolution,
    "wrapped unit": wrapped_unit,
    "activation": another_activation,
    **{
        f"{kind.__name__} {path}": kind(path)
        for kind in (patched_forward, hooked)
        for path in (
            "conv1",
            "conv1.act",
            "layer1.0.conv1",
            "layer1.0.conv2.conv",
            "layer2.0.conv1.norm",
            "layer2.0.conv2.norm.per_field",
            "layer2.0.downsample",
            "layer2.0.conv2.drop",
            "layer1.0.conv2.act",
            "maxpool",
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tree_runs_in_inference_too(change):
    model = create()
    before = model(X)
    CHANGES[change](model)
    inference, with_gradients = both_ways(model)
    torch.testing.assert_close(inference, with_gradients, rtol=1e-4, atol=1e-4)
    assert (inference - before).abs().max() > 1e-3  # the change is seen at all
    torch.testing.assert_close(reparameterize_model(model)(X), with_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_global_hooks_and_patched_classes(name, monkeypatch):
    model, called = create(name), []
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda module, inputs, output: called.append(type(module)))
    try:
        with torch.no_grad():
            model(X)
    finally:
        handle.remove()
    assert sum(issubclass(kind, nn.BatchNorm2d) for kind in called) == sum(
        isinstance(module, nn.BatchNorm2d) for module in model.modules()
    )
    before = both_ways(model)[0]
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.silu(x))
    inference, with_gradients = both_ways(model)
    torch.testing.assert_close(inference, with_gradients, rtol=1e-4, atol=1e-4)
    assert (inference - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_monte_carlo_dropout(name):
    model = create(name, drop_path_rate=0.5, zero_init_last=False)
    with torch.no_grad():
        before = model(X)
        for module in model.modules():
            if type(module) is DropPath:
                module.train()
        torch.manual_seed(1)
        assert not torch.allclose(model(X), before)


def test_fused_form_keeps_the_type():
    model = create().half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    fused = reparameterize_model(copy.deepcopy(model))
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float16}
    assert fused(X.half()).dtype == torch.float16


# Constants are no state


@pytest.mark.parametrize("name", NAMES)
def test_meta_then_load(name):
    trained = create(name)
    for assign in (False, True):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=5)
        if not assign:
            model = model.to_empty(device="cpu")
        assert str(model.load_state_dict(trained.state_dict(), assign=assign)) == "<All keys matched successfully>"
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        torch.testing.assert_close(model.eval()(X), trained(X))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_to_low_precision_and_back(name, dtype):
    model, control = create(name), create(name)
    control.load_state_dict(
        {k: v.to(dtype).to(v.dtype) if v.is_floating_point() else v for k, v in control.state_dict().items()}
    )
    assert torch.equal(model.to(dtype).float()(X), control(X))


def test_one_basis_for_all_and_none_in_the_state():
    model = create("c8resnet18_fast")
    names = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    assert names == {"running_mean", "running_var", "num_batches_tracked"}
    bases = {layer._basis.data_ptr() for layer in model.modules() if isinstance(layer, SteerableConv2d)}
    assert len(bases) == 3  # 7x7, 3x3 and 1x1


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")])
def test_constants_first_made_in_a_mode_are_ordinary(mode):
    import subprocess
    import sys

    entered = {torch.inference_mode: "torch.inference_mode()", FakeTensorMode: "FakeTensorMode()"}.get(
        mode, "torch.device('meta')"
    )
    code = (
        "import torch, timm, equivision_timm\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        f"with {entered}: timm.create_model('test_c8resnet').eval()(torch.zeros(1, 3, 64, 64))\n"
        "model = timm.create_model('test_c8resnet')\n"
        "model(torch.rand(2, 3, 64, 64)).sum().backward()\n"
        "assert model.layer1[0].conv1.conv.weight.grad.abs().sum() > 0\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Tracing, export, counting


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_symbolic_trace(name, fuse):
    model = create(name)
    expected = model(X)
    if fuse:
        model = reparameterize_model(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), expected, rtol=1e-4, atol=1e-4)
    if fuse:
        targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
        assert not any("equivision_timm" in str(getattr(target, "__module__", "")) for target in targets)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_torchscript_traces_without_a_warning(name):
    model = create(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X), rtol=1e-4, atol=1e-4)


def test_fake_tensors():
    with FakeTensorMode():
        for name in NAMES:
            model = timm.create_model(name).eval()
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert model(torch.rand(2, 3, 64, 64)).shape == (2, model.num_classes)


@pytest.mark.parametrize("grad", [True, False])
def test_operations_are_counted_as_those_of_the_dense_convolution(grad):
    counts = {}
    for strategy in ("expand", *([] if LACKS else ["native"])):
        layer, x = SteerableConv2d(3, 5, 3, "c8", stride=2, strategy=strategy), torch.rand(2, 24, 9, 9)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            layer(x)
        counts[strategy] = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    assert set(counts.values()) == {2 * 2 * 5 * 5 * (5 * 8) * (3 * 8) * 9}


@pytest.mark.filterwarnings("ignore")  # of the old exporter, on its own age
@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_old_onnx_exporter(opset, fuse):
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs ONNX files")
    model = create()
    expected = model(X)
    file = io.BytesIO()
    torch.onnx.export(reparameterize_model(model) if fuse else model, (X,), file, opset_version=opset, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
