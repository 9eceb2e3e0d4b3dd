"""What a GPU would be given, seen without one: fake CUDA tensors through whole networks, each operation recorded."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from equivision_timm.layers import SteerableConv2d, conv, conv_norm_act
from equivision_timm.layers.norm import FieldNorm
from equivision_timm.layers.strategies import STRATEGIES
from equivision_timm.layers.strategies.expand import Expand

LAST = torch.channels_last
MODELS = ["c8resnet18_fast", "c8resnet50_fast", "c8resnetaa50d", "c8resnetaf18_fast"]
PIXELS = 225
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous")


class Record(TorchDispatchMode):
    """The maps that leave each operation, (operation, tensor): four axes, a batch of BATCH and more than one pixel."""

    BATCH = 16

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and len(tensor) == self.BATCH:
                self.maps.append((str(function), tensor))
        return out

    def copied(self) -> list[str]:
        """Copies of more than 1 MB."""
        return [
            f"{name} {list(t.shape)}"
            for name, t in self.maps
            if name.startswith(COPIES) and t.numel() * t.element_size() > 2**20
        ]

    def not_in(self, memory_format: torch.memory_format) -> list[str]:
        """Maps that lie otherwise; those with the channels last in their shape are between two permutations."""
        maps = [(name, t) for name, t in self.maps if t.shape[2] * t.shape[3] > 1 and t.shape[1] > 3]
        maps = [(name, t) for name, t in maps if not name.startswith(("aten.permute", "aten.reflection_pad3d"))]
        return [f"{name} {list(t.shape)}" for name, t in maps if not t.is_contiguous(memory_format=memory_format)]


def record(name: str, dtype: torch.dtype, train: bool, memory_format: torch.memory_format, autocast=None) -> Record:
    """A network as on a GPU, all its parameters there, run once."""
    model = timm.create_model(name, **({"width": 16} if "_fast" not in name else {})).train(train)
    with FakeTensorMode():

        def move(tensor):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            moved = torch.empty(tensor.shape, dtype=kind, device="cuda")
            return moved.contiguous(memory_format=memory_format) if tensor.ndim == 4 else moved

        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(move(parameter))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = move(buffer)
        images = torch.empty(Record.BATCH, 3, PIXELS, PIXELS, dtype=dtype, device="cuda")
        images = images.contiguous(memory_format=memory_format)
        with Record() as found, torch.set_grad_enabled(train), torch.autocast("cuda", autocast, enabled=bool(autocast)):
            logits = model(images)
    assert logits.shape == (Record.BATCH, 1000)
    assert logits.dtype == (autocast or dtype)
    assert len(found.maps) > 50
    return found


@pytest.fixture(params=["training", "inference"])
def train(request, monkeypatch):
    """Inference takes the fused path, as it would where nothing is recorded."""
    if Version(torch.__version__) < Version("2.9") and not torch.cuda.is_available():
        pytest.skip("fake CUDA tensors of this PyTorch ask a driver")
    for module in (conv, conv_norm_act):
        monkeypatch.setattr(module, "inference_only", lambda *tensors: not torch.is_grad_enabled())
    return request.param == "training"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_last_maps_stay_so(name, dtype, train):
    found = record(name, dtype, train, LAST)
    assert not found.copied()
    assert not found.not_in(LAST)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
def test_autocast(memory_format, train, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    found = record("c8resnet18_fast", torch.float32, train, memory_format, autocast=torch.float16)
    assert not [line for line in found.copied() if not line.startswith("aten._to_copy")]  # the image is converted
    assert not found.not_in(memory_format)


def test_contiguous_maps_stay_so(train):
    found = record("c8resnet18_fast", torch.float32, train, torch.contiguous_format)
    assert not found.copied()
    assert not found.not_in(torch.contiguous_format)


def test_the_old_norm_copied_every_map(monkeypatch, train):
    """The control: statistics of [B, m, |G| * H, W], and a filter in one format for all maps."""
    monkeypatch.setattr(FieldNorm, "_goes_by_channel", lambda self, x: False)
    found = record("c8resnet18_fast", torch.float32, True, LAST)
    assert len(found.copied()) > 20


def test_a_filter_in_the_other_format_is_seen(monkeypatch, train):
    pack = Expand.pack

    def contiguous(self, weight, bias, layer):
        filters, bias = pack(self, weight, bias, layer)
        return filters.contiguous(), bias

    monkeypatch.setattr(Expand, "pack", contiguous)
    monkeypatch.setattr(Expand, "infer", lambda self, x, *args: _INFER(self, x.contiguous(), *args))
    found = record("c8resnet18_fast", torch.float32, train, LAST)
    assert found.copied()
    assert found.not_in(LAST)


_INFER = Expand.infer


class TestCacheFilters:
    """`cache_filters`: filters are kept without reading the weights, and made again where PyTorch counts a change."""

    @pytest.fixture(params=["expand", "block_diagonal", "native"])
    def model(self, request):
        model = timm.create_model("test_c8resnet", conv_strategy=request.param).eval()
        model.cache_filters()
        return model

    @pytest.fixture
    def packed(self, monkeypatch):
        """How often a strategy packed weights."""
        calls = []
        for strategy in STRATEGIES.values():
            pack = type(strategy).pack
            monkeypatch.setattr(type(strategy), "pack", lambda *a, pack=pack: calls.append(1) or pack(*a))
        return calls

    @torch.no_grad()
    def test_made_once(self, model, packed):
        x = torch.rand(2, 3, 33, 33)
        first = model(x)
        convolutions = len(packed)
        assert convolutions == sum(isinstance(m, SteerableConv2d) for m in model.modules())
        assert torch.equal(model(x), first)
        assert len(packed) == convolutions
        assert packed_on_meta(model) == convolutions  # other devices, too

    @torch.no_grad()
    def test_changes_that_pytorch_counts(self, model):
        x = torch.rand(2, 3, 33, 33)
        conv, norm = model.layer1[0].conv1.conv, model.layer1[0].conv1.norm.per_field
        changes = {
            "in place": lambda: conv.weight.mul_(1.5),
            "a statistic": lambda: norm.running_var.mul_(3),
            "eps": lambda: setattr(norm, "eps", 0.7),
            "load_state_dict": lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
            "another parameter": lambda: setattr(conv, "weight", nn.Parameter(conv.weight * 0.7)),
            "its data": lambda: setattr(conv.weight, "data", conv.weight.data * 1.3),
            "type": lambda: model.double(),
        }
        before = model(x)
        for name, change in changes.items():
            change()
            x = x.to(conv.weight.dtype)
            found = model(x)
            assert (found - before).abs().max() > 1e-5 or name == "type", name
            fresh = timm.create_model("test_c8resnet", conv_strategy="expand").eval().to(x.dtype)
            fresh.load_state_dict(model.state_dict())
            fresh.layer1[0].conv1.norm.per_field.eps = norm.eps
            torch.testing.assert_close(found, fresh(x), rtol=1e-4, atol=1e-5, msg=name)
            before = found

    @torch.no_grad()
    def test_what_it_cannot_see(self, model):
        """The control: behind PyTorch's back; switched off, or without it, nothing is missed."""
        x = torch.rand(2, 3, 33, 33)
        before = model(x)
        model.layer1[0].conv1.conv.weight.data.numpy()[:] *= 2
        assert torch.equal(model(x), before)
        model.cache_filters(False)
        assert (model(x) - before).abs().max() > 1e-4

    def test_gradients_do_not_meet_the_cache(self, model):
        x = torch.rand(2, 3, 33, 33)
        with torch.no_grad():
            model(x)
        model(x).sum().backward()
        assert model.layer1[0].conv1.conv.weight.grad.abs().max() > 0


def packed_on_meta(model: nn.Module) -> int:
    """How many convolutions pack their weights once in two calls on another device than the CPU.

    On the meta device, told that numbers are wanted there.
    """
    model = copy.deepcopy(model).to("meta")
    model.set_conv_strategy("expand")
    calls = []
    pack = Expand.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expand, "pack", lambda *a: calls.append(1) or pack(*a))
        for module in (conv, conv_norm_act):
            patch.setattr(module, "inference_only", lambda *tensors: True)
        for _ in range(2):
            model(torch.empty(2, 3, 33, 33, device="meta"))
    return len(calls)
