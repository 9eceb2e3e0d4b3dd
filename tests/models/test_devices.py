"""The operations on a GPU, seen without one: fake CUDA tensors through whole networks, each operation recorded."""

import dataclasses

import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from timm.models.convnext import ConvNeXtBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from equivision_timm.layers.strategies.expand import Expand
from equivision_timm.models.equivariant_convnext import EquivariantConvNeXtBlock

LAST = torch.channels_last
MODELS = {"test_c8resnet": {}, "c8resnetaa50d": {"width": 16}, "test_c8resnetaf": {}}
PIXELS = 225
modes = pytest.mark.parametrize("train", [True, False])
pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9") and not torch.cuda.is_available(),
    reason="fake CUDA tensors of this PyTorch ask a driver",
)
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
        views = ("aten.permute", "aten.view", "aten.reflection_pad3d")
        maps = [(name, t) for name, t in self.maps if t.shape[2] * t.shape[3] > 1 and t.shape[1] > 3]
        maps = [(name, t) for name, t in maps if not name.startswith(views)]
        return [f"{name} {list(t.shape)}" for name, t in maps if not t.is_contiguous(memory_format=memory_format)]


def record(name: str, dtype: torch.dtype, train: bool, memory_format: torch.memory_format, autocast=None) -> Record:
    """A network as on a GPU, all its parameters there, run once."""
    model = timm.create_model(name, num_classes=1000, **MODELS.get(name, {})).train(train)
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
    assert len(found.maps) > 20
    return found


@modes
@pytest.mark.parametrize(
    ("name", "dtype", "memory_format"),
    [*((name, torch.float16, LAST) for name in MODELS), ("test_c8resnet", torch.float32, torch.contiguous_format)],
)
def test_maps_keep_their_format(name, dtype, memory_format, train):
    found = record(name, dtype, train, memory_format)
    assert not found.copied()
    assert not found.not_in(memory_format)


@modes
def test_maps_of_convnexts_keep_their_format(train):
    """Those of convolutions and shortcuts; a norm between permutations has the channels last in its shape."""
    found = record("test_d4convnext", torch.float16, train, LAST)
    assert not found.copied()
    maps = [t for name, t in found.maps if name.startswith(("aten.convolution", "aten.add")) and t.shape[2] > 4]
    assert len(maps) == 1 + 3 + 2 * 5  # stem, downsampling, blocks
    assert all(t.is_contiguous(memory_format=LAST) for t in maps)


class Kernels(TorchDispatchMode):
    """Names and results of the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not str(function).startswith(("aten._unsafe_view", "aten.detach")):
            self.found.append((str(function), out))
        return out


@modes
def test_kernels_of_a_convnext_block(train):
    """At most 22, of timm's block 7, and no copy of a map."""
    counts = []
    for make in (lambda: ConvNeXtBlock(384), lambda: EquivariantConvNeXtBlock(48, "d4")):
        with torch.device("meta"), torch.set_grad_enabled(train):
            block, x = make().train(train), torch.empty(2, 384, 14, 14).to(memory_format=LAST)
            with Kernels() as kernels:
                assert block(x).is_contiguous(memory_format=LAST)
        copies = ("aten.clone", "aten.copy_", "aten.cat", "aten.stack")
        assert not [name for name, out in kernels.found if name.startswith(copies) and out.numel() >= x.numel() // 2]
        counts.append(len(kernels.found))
    assert counts[0] == 7
    assert counts[1] <= 22


@modes
def test_autocast(train, monkeypatch):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    found = record("test_c8resnet", torch.float32, train, LAST, autocast=torch.float16)
    assert not [line for line in found.copied() if not line.startswith("aten._to_copy")]  # the image is converted
    assert not found.not_in(LAST)


def test_a_norm_over_contiguous_fields_is_seen(monkeypatch):
    """The control: statistics of [B, m, |G| * H, W]."""
    monkeypatch.setattr("equivision_timm.layers.norm.is_channels_last", lambda x: False)
    found = record("test_c8resnet", torch.float32, True, LAST)
    assert found.copied()
    assert len(found.not_in(LAST)) > 5


def test_a_filter_in_the_other_format_is_seen(monkeypatch):
    def contiguous(self, x, weight, layer):
        layer = dataclasses.replace(layer, memory_format=torch.contiguous_format)
        return conv2d(self, x.contiguous(), weight, layer)

    conv2d = Expand.conv2d
    monkeypatch.setattr(Expand, "conv2d", contiguous)
    found = record("test_c8resnet", torch.float32, True, LAST)
    assert found.copied()
    assert found.not_in(LAST)
