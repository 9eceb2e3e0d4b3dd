"""`fuse_blocks`: the same output from standard operators, block diagonal where that costs less, in every layout."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model

from equivision_timm import fuse_blocks
from equivision_timm.groups import Group
from equivision_timm.layers import BlockConv2d, ConvNormAct, ElementMajor, SteerableConv2d
from equivision_timm.layers.block_conv import element_major_conv, swap_major
from equivision_timm.models import EquivariantFPN

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


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_no_basis(name: str) -> None:
    model = _model(name)
    before = copy.deepcopy(model.state_dict())
    fused = fuse_blocks(model)
    expected = model(_images())
    assert expected.std() > 1e-2
    assert _error(fused(_images()), expected) < 1e-5
    assert _blocks(fused) > 5
    assert not any(isinstance(module, SteerableConv2d | nn.BatchNorm2d) for module in fused.modules())
    assert not list(fused.buffers())
    assert not any(parameter.requires_grad for n, parameter in fused.named_parameters() if "stage" in n)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    dense = sum(parameter.numel() for parameter in reparameterize_model(model).parameters())
    assert sum(parameter.numel() for parameter in fused.parameters()) < 0.7 * dense


def test_no_images() -> None:
    fused = fuse_blocks(_model("c8resnet18_fast"))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert fused(_images()[:0]).shape == (0, fused.num_classes)


@torch.no_grad()
def test_maps_keep_their_layout() -> None:
    """features_only, with and without `map_pool`, forward_features, a segmentation network."""
    for kwargs in (dict(features_only=True), dict(features_only=True, map_pool="max")):
        model = _model("c8resnet18_fast", **kwargs)
        fused = fuse_blocks(model)
        assert _blocks(fused)
        for ours, expected in zip(fused(_images()), model(_images()), strict=True):
            assert _error(ours, expected) < 1e-5
    model = _model("d4resnet18_fast")
    assert _error(fuse_blocks(model).forward_features(_images()), model.forward_features(_images())) < 1e-5
    network = EquivariantFPN(_model("c8resnet18_fast", features_only=True), num_classes=2).eval()
    assert _error(fuse_blocks(network)(_images()), network(_images())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = _model("c8resnet18_fast").to(dtype)
    fused = fuse_blocks(model)
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    assert _error(fused(_images().to(dtype)), model(_images().to(dtype))) < tolerance


def _hook(model: nn.Module) -> None:
    model.layer3[0].register_forward_hook(lambda module, args, output: 2 * output)


def _replace(model: nn.Module) -> None:
    model.layer3[0].conv1.conv = nn.Conv2d(128, 256, 3, 2, 1, bias=False)


def _subclass(model: nn.Module) -> None:
    class Doubled(ConvNormAct):
        def forward(self, x, shortcut=None):
            return 2 * super().forward(x, shortcut)

    model.layer3[0].conv1.__class__ = Doubled


@torch.no_grad()
@pytest.mark.parametrize("change", [_hook, _replace, _subclass])
def test_changed_blocks_stay_as_they_are(change) -> None:
    """What was changed by hand counts, and the other residual blocks are block diagonal nevertheless."""
    model = _model("c8resnet18_fast")
    whole = _blocks(fuse_blocks(model))
    untouched = model(_images())
    change(model)
    fused = fuse_blocks(model)
    assert _error(fused(_images()), model(_images())) < 1e-5
    assert _error(fused(_images()), untouched) > 1e-3
    assert isinstance(fused.layer2, ElementMajor)
    assert isinstance(fused.layer3[1], ElementMajor)
    assert not isinstance(fused.layer3[0], ElementMajor)
    assert 0 < _blocks(fused) < whole


@torch.no_grad()
def test_models_without_such_stages() -> None:
    """Attention, another norm, no group, timm's own network: what `reparameterize_model` makes."""
    for name, kwargs in (
        ("c8resnet18_fast", dict(block_args={"attn_layer": "se"})),
        ("c8resnet18_fast", dict(norm_layer="groupnorm1")),
        ("c1resnet18_fast", {}),
        ("resnet18", {}),
        ("test_d4vit", {}),
    ):
        model = _model(name, **kwargs) if "vit" not in name else timm.create_model(name).eval()
        images = _images(64)
        fused = fuse_blocks(model)
        assert _blocks(fused) == 0
        assert _error(fused(images), model(images)) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.jit:DeprecationWarning")  # TorchScript's own
def test_leaves_python(tmp_path) -> None:
    """TorchScript, and torch.export with any batch."""
    model = _model("c8resnet18_fast")
    fused, images = fuse_blocks(model), _images()
    torch.jit.script(fused).save(tmp_path / "model.pt")
    assert _error(torch.jit.load(tmp_path / "model.pt")(images), model(images)) < 1e-5
    program = torch.export.export(fused, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert _error(program.module()(images[:1]), model(images[:1])) < 1e-5
