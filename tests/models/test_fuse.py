"""`fuse`: the same output as the model in eval mode, in every form; its weights are constants."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from torch.nn.utils import prune

from equivision_timm import fuse
from equivision_timm.groups import Group
from equivision_timm.layers import BlockConv2d, ConvNormAct, ElementMajor, NativeConv2d, SteerableConv2d
from equivision_timm.layers.block_conv import element_major_conv, swap_major
from equivision_timm.layers.strategies import native_library
from equivision_timm.models import EquivariantFPN

LACKS = native_library.why_not()
needs_native = pytest.mark.skipif(bool(LACKS), reason=str(LACKS))

NAMES = (
    "c4resnet18",
    "c8resnet18_fast",
    "c8resnet50_fast",
    "d8resnet18_fast",
    "d1resnet18_fast",
    "c16resnet18",
    "c6resnet18_fast",
    "c8resnetaf18_fast",
    "c8resnet50d",
    "c8resnetblur50",
    "c8reresnet50",
)


def _model(name: str, **kwargs) -> nn.Module:
    """In eval mode, with norms that do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        model(torch.randn(4, 3, 65, 65))
    return model.eval()


def _images(size: int = 65) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _blocks(model: nn.Module) -> int:
    return sum(isinstance(module, BlockConv2d) for module in model.modules())


def _error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("group", ["c1", "d1", "c3", "c4", "d3", "d4", "c5", "c8", "d8"])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 2), (5, 1, 1)])
def test_layer_is_the_definition(group: str, kernel_size: int, stride: int, dilation: int) -> None:
    """float64, odd numbers of fields and pixels; groups with an odd number of one-dimensional irreps among them."""
    conv = SteerableConv2d(3, 5, kernel_size, group, stride=stride, dilation=dilation, dtype=torch.float64)
    bias, order = torch.randn(5, dtype=torch.float64), Group.from_name(group).order
    blocks = BlockConv2d(conv, conv.weight, bias)
    x = torch.randn(2, 3 * order, 9, 7, dtype=torch.float64)
    expected = conv(x) + bias.repeat_interleave(order)[:, None, None]
    y = swap_major(blocks(swap_major(x, 3)), order)
    assert y.shape == expected.shape
    assert _error(y, expected) < 1e-12
    blocks.weight[0] += 0.1
    assert _error(swap_major(blocks(swap_major(x, 3)), order), expected) > 1e-3  # the comparison sees a weight


@torch.no_grad()
def test_dense_form_is_the_definition() -> None:
    conv = SteerableConv2d(1, 2, 3, "c4")
    plain = element_major_conv(conv, conv.weight, torch.tensor([1.0, -1.0]))
    assert type(plain) is nn.Conv2d
    x = torch.randn(2, 4, 9, 9)
    expected = conv(x) + torch.tensor([1.0, -1.0]).repeat_interleave(4)[:, None, None]
    assert _error(swap_major(plain(swap_major(x, 1)), 4), expected) < 1e-5


FORMS = [pytest.param("native", marks=needs_native), "blocks", "dense"]
forms = pytest.mark.parametrize("form", FORMS)


@torch.no_grad()
@forms
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_no_basis(name: str, form: str) -> None:
    model = _model(name)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, form, 65)
    expected = model(_images())
    assert expected.std() > 1e-2
    assert _error(fused(_images()), expected) < 1e-5
    assert _error(fused(_images(97)), model(_images(97))) < 1e-5  # another size
    kinds = {"native": NativeConv2d, "blocks": BlockConv2d, "dense": nn.Conv2d}
    assert sum(isinstance(module, kinds[form]) for module in fused.modules()) > 5
    assert not any(isinstance(module, (SteerableConv2d, nn.BatchNorm2d)) for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if form != "dense":
        size = sum(tensor.numel() for tensor in fused.state_dict().values())
        assert size < 0.7 * sum(parameter.numel() for parameter in fuse(model, "dense").parameters())


@torch.no_grad()
def test_the_default_and_timms_hook() -> None:
    """None is the C code on a CPU that has it; `reparameterize_model` gives standard operators, in blocks."""
    model = _model("c8resnet18_fast")
    assert any(isinstance(module, NativeConv2d) for module in fuse(model).modules()) == (LACKS is None)
    fused = reparameterize_model(model)
    assert [type(m) for m in fused.modules()] == [type(m) for m in fuse(model, "blocks").modules()]
    unit = ConvNormAct(2, 3, 3, "c4").eval()
    x = torch.randn(2, 8, 9, 9)
    assert _error(fuse(unit)(x), unit(x)) < 1e-5  # the root itself is a unit
    assert _error(fuse(unit.conv)(x), unit.conv(x)) < 1e-5
    assert (fuse(unit)(x, torch.ones(2, 12, 9, 9)) - unit(x, torch.ones(2, 12, 9, 9))).abs().max() < 1e-5


def test_arguments() -> None:
    model = _model("c8resnet18_fast")
    with pytest.raises(ValueError, match="onnx"):
        fuse(model, "onnx")
    with pytest.raises(RuntimeError, match="meta"):
        fuse(model.to("meta"), "native")


@needs_native
def test_a_named_strategy_counts() -> None:
    """A layer whose strategy is not native becomes a plain convolution."""
    model = _model("c8resnet18_fast", conv_strategy={"layer1.0.conv1.conv": "expand"})
    fused = fuse(model, "native")
    assert isinstance(fused.layer1[0].conv1.conv, nn.Conv2d)
    assert isinstance(fused.layer1[0].conv2, NativeConv2d)


@forms
def test_derivatives_with_respect_to_the_image(form: str) -> None:
    model = _model("c8resnet18_fast").double()
    x = _images().double().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert _error(torch.autograd.grad(fuse(model, form)(x).square().sum(), x)[0], expected) < 1e-10


@torch.no_grad()
@forms
def test_copies_and_pickles(form: str) -> None:
    fused = fuse(_model("c8resnet18_fast"), form)
    expected = fused(_images())
    assert torch.equal(copy.deepcopy(fused)(_images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(_images()), expected)
    other = fuse(_model("c8resnet18_fast", num_classes=1000), form)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(2) if tensor.is_floating_point() else None
    assert _error(other(_images()), expected) > 1e-3
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(_images()), expected)


@torch.no_grad()
@forms
def test_autocast(form: str) -> None:
    model = _model("c8resnet18_fast")
    with torch.autocast("cpu", torch.bfloat16):
        y = fuse(model, form)(_images())
    assert y.dtype == torch.bfloat16
    assert _error(y.float(), model(_images())) < 0.1


@needs_native
def test_native_says_what_to_do_elsewhere() -> None:
    fused = fuse(_model("c8resnet18_fast"), "native")
    for moved in (copy.deepcopy(fused).bfloat16(), copy.deepcopy(fused).to("meta")):
        parameter = next(moved.parameters())
        with pytest.raises(RuntimeError, match="fuse"):
            moved(_images().to(parameter))


@needs_native
@torch.no_grad()
def test_weights_packed_for_another_processor_are_refused() -> None:
    fused = fuse(_model("c8resnet18_fast"), "native")
    for module in fused.modules():
        if isinstance(module, NativeConv2d):
            module.packed = module.packed.reshape(-1, 1)
    with pytest.raises(ValueError, match="processor"):
        fused(_images())


@needs_native
@torch.no_grad()
def test_native_compiles() -> None:
    fused = fuse(_model("c8resnet18_fast"), "native")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert _error(compiled(_images()), fused(_images())) < 1e-5


@forms
def test_no_images(form: str) -> None:
    for kwargs in ({}, {"block_args": {"attn_layer": "eca"}}):
        fused = fuse(_model("c8resnet18_fast", **kwargs), form)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert fused(_images()[:0]).shape == (0, fused.num_classes)


@torch.no_grad()
@forms
def test_maps_keep_their_layout(form: str) -> None:
    """features_only, with and without `map_pool`, forward_features, a segmentation network."""
    for kwargs in (dict(features_only=True), dict(features_only=True, map_pool="max")):
        model = _model("c8resnet18_fast", **kwargs)
        for ours, expected in zip(fuse(model, form)(_images()), model(_images()), strict=True):
            assert _error(ours, expected) < 1e-5
    model = _model("d4resnet18_fast")
    assert _error(fuse(model, form).forward_features(_images()), model.forward_features(_images())) < 1e-5
    network = EquivariantFPN(_model("c8resnet18_fast", features_only=True), num_classes=2).eval()
    assert _error(fuse(network, form)(_images()), network(_images())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", ["blocks", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype, form: str) -> None:
    model = _model("c8resnet18_fast").to(dtype)
    fused = fuse(model, form)
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    assert _error(fused(_images().to(dtype)), model(_images().to(dtype))) < tolerance


def _hook(model: nn.Module) -> None:
    model.layer3[0].register_forward_hook(lambda module, args, output: 2 * output)


def _hook_inside(model: nn.Module) -> None:
    model.layer3[0].conv1.conv.register_forward_hook(lambda module, args, output: 2 * output)


def _patch(model: nn.Module) -> None:
    norm = model.layer3[0].conv1.norm
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


def _replace(model: nn.Module) -> None:
    model.layer3[0].conv1.conv = nn.Conv2d(128, 256, 3, 2, 1, bias=False)


def _subclass(model: nn.Module) -> None:
    class Doubled(ConvNormAct):
        def forward(self, x, shortcut=None):
            return 2 * super().forward(x, shortcut)

    model.layer3[0].conv1.__class__ = Doubled


def _prune(model: nn.Module) -> None:
    prune.random_unstructured(model.layer3[0].conv1.conv, "weight", amount=0.5)


@torch.no_grad()
@forms
@pytest.mark.parametrize("change", [_hook, _hook_inside, _patch, _replace, _subclass, _prune])
def test_changed_blocks_stay_as_they_are(change, form: str) -> None:
    """What was changed by hand counts, and the other residual blocks are block diagonal nevertheless."""
    model = _model("c8resnet18_fast")
    whole, untouched = _blocks(fuse(model, form)), model(_images())
    change(model)
    expected = model(_images())  # pruning makes its weight in the forward pass
    fused = fuse(model, form)
    assert _error(fused(_images()), expected) < 1e-5
    assert _error(fused(_images()), untouched) > 1e-3
    if form == "blocks":
        assert isinstance(fused.layer2, ElementMajor)
        assert isinstance(fused.layer3[1], ElementMajor)
        assert not isinstance(fused.layer3[0], ElementMajor)
        assert 0 < _blocks(fused) < whole


@torch.no_grad()
@forms
def test_models_without_such_stages(form: str) -> None:
    """Attention, another norm, another activation, no group, timm's own network, a vision transformer."""
    for name, kwargs in (
        ("c8resnet18_fast", dict(block_args={"attn_layer": "se"})),
        ("c8resnet18_fast", dict(norm_layer="groupnorm1")),
        ("c8resnet18_fast", dict(act_layer="silu")),
        ("c8resnet18_fast", dict(drop_path_rate=0.5, drop_block_rate=0.2)),
        ("c1resnet18_fast", {}),
        ("resnet18", {}),
        ("test_d4vit", {}),
    ):
        model = _model(name, **kwargs) if "vit" not in name else timm.create_model(name).eval()
        images = _images(64)
        assert _error(fuse(model, form)(images), model(images)) < 1e-5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_nothing_is_kept_from_before_a_change(optimizer) -> None:
    """Fused optimizers and running statistics raise no version count, and inference tensors have none: the model in
    inference mode follows its weights, and a copy fused before does not change."""
    model = timm.create_model("test_c8resnet").train()
    fused = fuse(model)
    with torch.no_grad():
        before, kept = model.eval()(_images()), fused(_images())
    model.train()(_images()).square().sum().backward()
    optimizer(model.parameters(), lr=1e-2, fused=True).step()
    exact = timm.create_model("test_c8resnet", conv_strategy="expand").double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.inference_mode():
        after = model.eval()(_images())
        assert _error(after.double(), exact(_images().double())) < 1e-5
        assert _error(after, before) > 1e-3
        assert torch.equal(fused(_images()), kept)
        made = timm.create_model("test_c8resnet").eval()
        made.load_state_dict(model.state_dict())
        assert _error(made(_images()), after) < 1e-5
        for parameter in made.parameters():
            parameter.mul_(0.5)
        assert _error(made(_images()), after) > 1e-3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
def test_leaves_python(tmp_path) -> None:
    """TorchScript, and torch.export with any batch."""
    model = _model("c8resnet18_fast")
    fused, images = fuse(model, "blocks"), _images()
    torch.jit.script(fused).save(tmp_path / "model.pt")
    assert _error(torch.jit.load(tmp_path / "model.pt")(images), model(images)) < 1e-5
    program = torch.export.export(fused, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert _error(program.module()(images[:1]), model(images[:1])) < 1e-5
