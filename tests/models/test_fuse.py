"""`fuse`: the same output as the model in eval mode, in every form; its weights are constants."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from support.results import relative
from support.small_models import stirred
from timm.layers import BatchNormAct2d
from timm.utils.model import reparameterize_model
from torch.nn.utils import parametrize, prune

from equivision_timm import fuse
from equivision_timm.groups import Group
from equivision_timm.layers import BlockConv2d, ConvNormAct, ElementMajor, NativeConv2d, SteerableConv2d
from equivision_timm.layers.block_conv import element_major_conv, swap_major
from equivision_timm.layers.strategies import native_library
from equivision_timm.models import EquivariantFPN

LACKS = native_library.why_not()
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))
FORMS = [pytest.param("native", marks=needs_native), "blocks", "dense"]
forms = pytest.mark.parametrize("form", FORMS)
NAMES = {
    "c4resnet18": {"width": 16},
    "c8resnet50_fast": {},
    "d8resnet18_fast": {},
    "d1resnet18_fast": {},
    "c16resnet18": {"width": 4},
    "c6resnet18_fast": {},
    "c8resnetaf18_fast": {},
    "c8resnet50d": {"width": 8, "even": "box"},
    "c8resnetblur50": {"width": 8},
    "c8reresnet50": {"width": 8},
}


def make(name="test_c8resnet", **kwargs):
    torch.manual_seed(0)
    return stirred(timm.create_model(name, **kwargs))


def images(size=65):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("group", ["c1", "d1", "c4", "d3", "d4", "c6", "c8", "d8"])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 2), (5, 1, 1)])
def test_layer_is_the_definition(group, kernel_size, stride, dilation):
    """Odd numbers of fields and pixels."""
    conv = SteerableConv2d(3, 5, kernel_size, group, stride=stride, dilation=dilation, dtype=torch.float64)
    bias, order = torch.randn(5, dtype=torch.float64), Group.from_name(group).order
    x = torch.randn(2, 3 * order, 9, 7, dtype=torch.float64)
    expected = conv(x) + bias.repeat_interleave(order)[:, None, None]
    for layer in (BlockConv2d(conv, conv.weight, bias), element_major_conv(conv, conv.weight, bias)):
        y = swap_major(layer(swap_major(x, 3)), order)
        assert y.shape == expected.shape
        assert relative(y, expected) < 1e-12
        layer.weight[0] += 0.1
        assert relative(swap_major(layer(swap_major(x, 3)), order), expected) > 1e-3  # the control


@torch.no_grad()
@forms
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_no_basis(name, form):
    model = make(name, **NAMES[name])
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, form, 65)
    for x in (images(), torch.randn(2, 3, 66, 49)):  # also another size than it is fused for
        assert model(x).std() > 1e-2
        assert relative(fused(x), model(x)) < 1e-5
    assert count(fused, {"native": NativeConv2d, "blocks": BlockConv2d, "dense": nn.Conv2d}[form]) > 5
    assert not count(fused, (SteerableConv2d, nn.BatchNorm2d))
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if form == "dense":
        assert not list(fused.buffers())
        assert {type(m) for m in fused.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
        next(m for m in fused.modules() if isinstance(m, nn.Conv2d)).bias.zero_()
        assert relative(fused(images()), model(images())) > 1e-3  # the control: a forgotten norm
    else:
        size = sum(tensor.numel() for tensor in fused.state_dict().values())
        assert size < 0.7 * sum(parameter.numel() for parameter in fuse(model, "dense").parameters())


@torch.no_grad()
def test_the_default_timms_hook_and_bad_arguments():
    """None is the C code on a CPU that has it; `reparameterize_model` gives standard operators, in blocks."""
    model = make("c8resnet18_fast")
    assert bool(count(fuse(model), NativeConv2d)) == (LACKS is None)
    assert [type(m) for m in reparameterize_model(model).modules()] == [
        type(m) for m in fuse(model, "blocks").modules()
    ]
    unit, x, shortcut = ConvNormAct(2, 3, 3, "c4").eval(), torch.randn(2, 8, 9, 9), torch.ones(2, 12, 9, 9)
    assert relative(fuse(unit)(x, shortcut), unit(x, shortcut)) < 1e-5  # the root itself is a unit
    assert relative(fuse(unit.conv)(x), unit.conv(x)) < 1e-5
    with pytest.raises(ValueError, match="onnx"):
        fuse(make(), "onnx")
    with pytest.raises(RuntimeError, match="meta"):
        fuse(make().to("meta"), "native")


@forms
def test_derivatives_with_respect_to_the_image(form):
    model, x = make().double(), images().double().requires_grad_()
    found, expected = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (fuse(model, form), model))
    assert relative(found, expected) < 1e-10


@torch.no_grad()
@forms
def test_copies_and_pickles(form):
    fused = fuse(make(), form)
    expected = fused(images())
    assert torch.equal(copy.deepcopy(fused)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(images()), expected)
    other = fuse(make(), form)
    for tensor in other.state_dict().values():
        tensor.mul_(2) if tensor.is_floating_point() else None
    assert relative(other(images()), expected) > 1e-3
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(images()), expected)


@torch.no_grad()
@forms
def test_types(form):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = fuse(model, form)(images())
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), model(images())) < 0.1
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.1)):
        if form != "native" or dtype == torch.float64:
            model = make().to(dtype)
            fused = fuse(model, form)
            assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
            assert relative(fused(images().to(dtype)), model(images().to(dtype))) < tolerance


@needs_native
def test_native_compiles_and_says_what_to_do_elsewhere():
    fused = fuse(make(), "native")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert relative(compiled(images()), fused(images())) < 1e-5
    with pytest.raises(ValueError, match="fuse"):
        fused.bfloat16()(images().bfloat16())


@torch.no_grad()
@forms
def test_maps_keep_their_layout(form):
    """features_only, with and without `map_pool`, forward_features, a segmentation network."""
    for kwargs in ({}, {"map_pool": "max"}):
        model = make(features_only=True, **kwargs)
        for found, expected in zip(fuse(model, form)(images()), model(images()), strict=True):
            assert relative(found, expected) < 1e-5
    model = make()
    assert relative(fuse(model, form).forward_features(images()), model.forward_features(images())) < 1e-5
    network = EquivariantFPN(make(features_only=True), num_classes=2).eval()
    assert relative(fuse(network, form)(images()), network(images())) < 1e-5


class Doubling(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, *args):
        return 2 * self.inner(*args)


def hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)


def patch(model, path):
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def wrap(model, path):
    model.set_submodule(path, Doubling(model.get_submodule(path)))


def squash(model, path):
    fields = model.get_submodule(path).num_features
    model.set_submodule(path, BatchNormAct2d(fields, act_layer=nn.Sigmoid).eval())


def replace(model, path):
    conv = model.get_submodule(path)
    channels = [fields * conv.order for fields in (conv.in_fields, conv.out_fields)]
    model.set_submodule(path, nn.Conv2d(*channels, 3, conv.stride, 1, bias=False))


def subclass(model, path):
    class Doubled(ConvNormAct):
        def forward(self, x, shortcut=None):
            return 2 * super().forward(x, shortcut)

    model.get_submodule(path).__class__ = Doubled


def prune_half(model, path):
    prune.random_unstructured(model.get_submodule(path), "weight", amount=0.5)


def parametrise(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Doubling())


PLACES = ("conv1", "conv1.act", "layer1.0.conv1", "layer1.0.conv2.conv", "layer2.0.conv1.norm", "layer1.0.conv2.act")
PLACES += ("layer2.0.conv2.norm.per_field", "layer2.0.downsample", "layer2.0.conv2.drop", "maxpool")
CHANGES = [(hook, path) for path in PLACES] + [(patch, "layer1.0.conv2.conv")]
CHANGES += [(wrap, path) for path in ("layer2.0.conv1.conv", "layer2.0.conv2", "layer1.0.conv2.drop")]
CHANGES += [(squash, "layer1.0.conv1.norm.per_field"), (subclass, "layer1.0.conv1")]
CHANGES += [(change, "layer2.0.conv1.conv") for change in (replace, prune_half, parametrise)]


@pytest.mark.parametrize(("change", "path"), CHANGES)
def test_changes_by_hand_count(change, path):
    """With gradients, in inference, and fused."""
    model = make()
    untouched = model(images()).detach()
    change(model, path)
    expected = model(images()).detach()
    assert relative(expected, untouched) > 1e-3
    with torch.no_grad():
        assert relative(model(images()), expected) < 1e-5
        for form in ("blocks", "dense", *([] if LACKS else ["native"])):
            assert relative(fuse(model, form)(images()), expected) < 1e-5


def test_units_with_backward_hooks_stay():
    """As for a gradient with respect to the image, which such a hook changes; other blocks are block diagonal."""
    model, x = make("c8resnet18_fast"), images().requires_grad_()
    model.layer3[0].conv1.conv.register_full_backward_hook(lambda module, grad, _: (2 * grad[0],))
    for form in ("blocks", "dense"):
        fused = fuse(model, form)
        assert [name for name, m in fused.named_modules() if isinstance(m, SteerableConv2d)] == ["layer3.0.conv1.conv"]
        (expected,), (found,) = (torch.autograd.grad(network(x).sum(), x) for network in (model, fused))
        assert relative(found, expected) < 1e-4
    fused = fuse(model, "blocks")
    found = [isinstance(module, ElementMajor) for module in (fused.layer2, fused.layer3[1], fused.layer3[0])]
    assert found == [True, True, False]


@torch.no_grad()
@forms
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_c8resnet", {"block_args": {"attn_layer": "se"}}),
        ("test_c8resnet", {"norm_layer": "groupnorm1"}),
        ("test_c8resnet", {"act_layer": "silu"}),
        ("test_c8resnet", {"drop_path_rate": 0.5, "drop_block_rate": 0.2}),
        ("test_c1resnet", {}),
        ("test_resnet", {}),
        ("test_d4vit", {}),
    ],
    ids=str,
)
def test_models_without_such_stages(name, kwargs, form):
    """Attention, another norm, another activation, no group, timm's own network, a vision transformer."""
    model = make(name, **kwargs) if "vit" not in name else timm.create_model(name, pretrained=True).eval()
    fused = fuse(model, form)
    assert relative(fused(images(64)), model(images(64))) < 1e-5
    assert fused(images(64)[:0]).shape == (0, model.num_classes)


def test_weights_are_read_anew_and_copies_stay():
    """Fused optimizers and running statistics raise no version count: the model follows its weights all the same."""
    model = timm.create_model("test_c8resnet").train()
    fused = fuse(model)
    with torch.no_grad():
        before, copied = model.eval()(images()), fused(images())
    model.train()(images()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-2, fused=True).step()
    exact = timm.create_model("test_c8resnet", conv_strategy="expand").double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        after = model.eval()(images())
        assert relative(after.double(), exact(images().double())) < 1e-5
        assert relative(after, before) > 1e-3
        assert torch.equal(fused(images()), copied)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert relative(model(images()), after) > 1e-3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
def test_leaves_python(tmp_path):
    """TorchScript, torch.fx, and torch.export with any batch."""
    model = make()
    fused, x = fuse(model, "blocks"), images()
    torch.jit.script(fused).save(tmp_path / "model.pt")
    assert relative(torch.jit.load(tmp_path / "model.pt")(x), model(x)) < 1e-5
    traced = torch.fx.symbolic_trace(fused)
    assert relative(traced(x), model(x)) < 1e-5
    assert not any("equivision_timm" in str(getattr(node.target, "__module__", "")) for node in traced.graph.nodes)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert relative(program.module()(x[:1]), model(x[:1])) < 1e-5
