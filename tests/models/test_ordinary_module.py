"""A model is an ordinary PyTorch module: what timm's ResNet can do it can do, with right values."""

import pytest
import timm
import torch
import torch.nn as nn
from support.results import onnx_function
from timm.utils.model import reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import native_library

LACKS = native_library.why_not()
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
FAST = ["block_diagonal", pytest.param("native", marks=needs_native)]
names = pytest.mark.parametrize("name", ["test_resnet", "test_c8resnet"])  # the control first
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


# Derivatives, compared with the definition


@forward_mode
@names
def test_forward_mode_and_transforms(name):
    model = create(name).double()
    x, tangent = X.double(), torch.rand_like(X).double()
    _, found = torch.func.jvp(model, (x,), (tangent,))
    step = 1e-6
    slope = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6)

    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    direction = {key: torch.randn_like(value) for key, value in parameters.items()}
    gradients = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    torch.testing.assert_close(list(gradients.values()), list(expected))
    _, slope = torch.func.jvp(lambda p: loss(p, x), (parameters,), (direction,))
    torch.testing.assert_close(slope, sum((gradients[key] * direction[key]).sum() for key in parameters))

    each = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(each, model(x))
    jacobian = torch.func.jacrev(lambda image: model(image[None])[0])(x[0])
    (row,) = torch.autograd.grad(model(x.requires_grad_())[0, 3], x)
    torch.testing.assert_close(jacobian[3], row[0])


@forward_mode
def test_transforms_of_each_strategy():
    layer, x = SteerableConv2d(1, 2, 3, "d4", stride=2, dtype=torch.float64), torch.rand(2, 8, 5, 5).double()
    found = {}
    for layer.strategy in ("expand", "block_diagonal"):
        each = torch.func.vmap(lambda image: layer(image[None])[0])(x)
        found[layer.strategy] = [each, torch.func.jvp(layer, (x,), (x.sin(),))[1], torch.func.jacrev(layer)(x)]
    torch.testing.assert_close(found["block_diagonal"], found["expand"])
    if not LACKS:
        layer.strategy = "native"
        for call in (lambda: torch.func.vmap(layer)(x[None]), lambda: torch.func.jvp(layer, (x,), (x,))):
            with pytest.raises(RuntimeError, match="native"):
                call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of any operator in old-style vmap
@pytest.mark.parametrize("strategy", FAST)
def test_gradient_penalty_and_batched_gradients(strategy):
    found = {}
    for name in ("expand", strategy):
        model = create(conv_strategy=name).double()
        x = X.double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        penalty = torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True)
        (rows,) = torch.autograd.grad(model(x)[0], x, torch.eye(5, dtype=torch.float64), is_grads_batched=True)
        found[name] = [*(value for value in penalty if value is not None), rows]
    torch.testing.assert_close(found[strategy], found["expand"])
    assert found["expand"][0].abs().max() > 0


@pytest.mark.parametrize("strategy", ["auto", *FAST])
@torch.no_grad()
def test_other_weights_and_parametrisations(strategy):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    found = {}
    for name in ("expand", strategy):
        model = create(conv_strategy=name)
        other = {key: value * 1.5 for key, value in model.named_parameters()}
        plain, called, after = model(X), torch.func.functional_call(model, other, (X,)), model(X)
        parametrize.register_parametrization(model.layer1[0].conv1.conv, "weight", Doubled())
        found[name] = plain, called, after, model(X)
        assert torch.equal(plain, after)
        assert min((plain - called).abs().max(), (plain - found[name][3]).abs().max()) > 1e-2
    torch.testing.assert_close(found[strategy], found["expand"], rtol=1e-4, atol=1e-4)


# Types and devices


@needs_native
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_types_must_agree(grad, types):
    layer = SteerableConv2d(8, 8, 3, "c8", strategy="native", dtype=types[0])
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="same"):
        layer(torch.rand(1, 64, 33, 33, dtype=types[1]))


@pytest.mark.parametrize("grad", [True, False])
@names
def test_devices_must_agree(name, grad):
    """Also if C would read the weights: the meta device stands for every one whose memory a CPU cannot read."""
    ordinary, empty = create(name), create(name).to("meta")
    with torch.set_grad_enabled(grad):
        assert empty(X.to("meta")).shape == (2, 5)
        for model, images in ((empty, X), (ordinary, X.to("meta"))):
            with pytest.raises(RuntimeError, match="device"):
                model(images)
        if name == "test_c8resnet":
            ordinary.layer1[0].conv1.norm.to("meta")
            with pytest.raises(RuntimeError, match="device"):
                ordinary(X)


@names
def test_meta_then_load(name):
    trained = create(name)
    for assign in (False, True):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=5)
        if not assign:
            model = model.to_empty(device="cpu")
        model.load_state_dict(trained.state_dict(), assign=assign)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        torch.testing.assert_close(model.eval()(X), trained(X))


@names
@torch.no_grad()
def test_to_low_precision_and_back(name):
    """The weights are rounded, constants such as kernel bases are not."""
    model, control = create(name), create(name)
    for tensor in control.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    assert model.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(model.float()(X), control(X))


@pytest.mark.parametrize("group", ["c9", "d5", "c10"])  # kernels that nothing else in this process makes
def test_constants_first_made_in_a_mode_are_ordinary(group):
    with {"c9": torch.inference_mode(), "d5": FakeTensorMode(), "c10": torch.device("meta")}[group]:
        timm.create_model("test_c8resnet", group=group).eval()(torch.zeros(1, 3, 64, 64))
    model = timm.create_model("test_c8resnet", group=group)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert model.layer1[0].conv1.conv.weight.grad.abs().sum() > 0


# Tracing and export


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@torch.no_grad()
def test_traced_and_scripted():
    model = create()
    assert model(X).std() > 1e-2
    for program in (torch.fx.symbolic_trace(model), torch.jit.trace(model, X), torch.jit.script(model)):
        for images in (X, X[:1]):
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the exporter, on its own age
@torch.no_grad()
def test_the_old_onnx_exporter(tmp_path):
    model = create()
    for network in (model, reparameterize_model(model)):
        exported = onnx_function(tmp_path, network, X, dynamo=False)
        torch.testing.assert_close(exported(X), model(X), rtol=1e-3, atol=1e-4)
