"""The four recipes of the README's development part, each done outside the package."""

import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import build_model_with_cfg

from equivision_timm import ConvNormAct, EquivariantBackbone, Group, SteerableConv2d, model_names
from equivision_timm.cli.main import main
from equivision_timm.layers.strategies import STRATEGIES, register
from equivision_timm.layers.strategies.expand import Expand
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.models.variants import Variant, forget, register_family
from equivision_timm.testing import assert_equivariant, equivariance_error
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.weights.verify import verify


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, the first one with a stride."""

    def __init__(self, in_fields, fields, group, **dd):
        super().__init__()
        self.conv1 = ConvNormAct(in_fields, fields, 3, group, stride=2, **dd)
        self.conv2 = ConvNormAct(fields, fields, 3, group, **dd)

    def forward(self, x):
        x = self.conv1(x)
        return self.conv2(x, x)


class TwoBlocks(EquivariantBackbone):
    """A family: a stem and two stages of one block."""

    def __init__(
        self,
        group,
        width,
        num_classes=10,
        in_chans=3,
        global_pool="avg",
        group_pool="max",
        map_pool="",
        drop_rate=0.0,
        conv_strategy="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(group, in_chans, map_pool, drop_rate)
        dd = {"device": device, "dtype": dtype}
        stem = ConvNormAct(in_chans, width, 5, group, "trivial", stride=2, **dd)
        self.add_level("stem1", stem, width, reduction=2)
        self.pool = nn.Identity()
        self.add_level("layer1", Block(width, width, group, **dd), width, reduction=4)
        self.add_level("layer2", Block(width, 2 * width, group, **dd), 2 * width, reduction=8)
        self.create_head(num_classes, global_pool, group_pool, conv_strategy, **dd)

    def stem(self, x):
        return self.stem1(x)

    def pool_stem(self, x):
        return self.pool(x)

    def stages(self, x):
        return self.layer2(self.layer1(x))

    def remove_stem_pool(self):
        pass


def create_two_blocks(name, pretrained, **kwargs):
    return build_model_with_cfg(TwoBlocks, name, pretrained, **kwargs)


CFG = {
    "num_classes": 10,
    "input_size": (3, 33, 33),
    "pool_size": (5, 5),
    "first_conv": "stem1.conv",
    "classifier": "fc",
}
CFG |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def family():
    rows = {
        name: Variant(f"Two blocks of {name}.", {"group": name[3:], "width": 3}, CFG) for name in ("twoc4", "twod4")
    }
    register_family(__name__, TwoBlocks, create_two_blocks, rows)
    yield list(rows)
    forget(rows)


@pytest.fixture(scope="module", autouse=True)
def this_module():
    """Under pytest's importlib mode a test file may not be in sys.modules, where timm looks for entrypoints."""
    before = sys.modules.get(__name__)
    sys.modules[__name__] = sys.modules.get(__name__) or type(sys)(__name__)
    yield
    if before is None:
        del sys.modules[__name__]


def test_another_group():
    model = timm.create_model("c8resnet18_fast", group="c6", width=2, num_classes=3)
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 65, 65))
    assert_equivariant(model.eval(), 65)
    assert Group.from_name("c6").grid_elements == [0, 3]  # exact: the half turn; the others are resampled
    assert equivariance_error(model, 65)[1] > 1e-4


@pytest.mark.parametrize("size", [5, 7])
@pytest.mark.parametrize("group", ["c4", "d6"])
def test_another_kernel_size(group, size):
    layer = SteerableConv2d(2, 3, size, group, stride=2)
    order = Group.from_name(group).order
    kind = {"input_type": "regular", "output_type": "regular"}
    assert_equivariant(layer, 13, group=group, in_channels=2 * order, **kind)
    with torch.no_grad():  # the control: a dense filter that is not made of the basis
        filters = torch.randn(3 * order, 2 * order, size, size)
    broken = nn.Conv2d(2 * order, 3 * order, size, 2, size // 2, bias=False)
    broken.weight = nn.Parameter(filters)
    with pytest.raises(AssertionError, match=r"not .*-equivariant"):
        assert_equivariant(broken, 13, group=group, in_channels=2 * order, **kind)


def test_another_strategy():
    @register
    class Doubtful(Expand):
        name = "in two halves"

        def conv2d(self, x, weight, layer):
            run = partial(super().conv2d, weight=weight, layer=layer)
            return torch.cat([run(half) for half in x.split((len(x) + 1) // 2)])

    try:
        model = timm.create_model("test_c8resnet", pretrained=True).eval()
        x = torch.rand(3, 3, 65, 65)
        expected = model(x)
        model.set_conv_strategy("in two halves")
        assert "in two halves" in model.conv_strategies(size=65).values()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    finally:
        del STRATEGIES["in two halves"]
    with pytest.raises(ValueError, match="unknown conv_strategy 'in two halves'"):
        model.set_conv_strategy("in two halves")


def test_another_family_is_a_model_of_timm(family):
    assert set(family) <= set(model_names()) & set(timm.list_models("two*"))
    model = timm.create_model("twoc4")
    assert model.exact_sizes(40) == (33, 41)
    assert_equivariant(model.eval(), 33)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    x, labels = torch.rand(4, 3, 33, 33), torch.arange(4)
    before = nn.functional.cross_entropy(model(x), labels)
    before.backward()
    optimizer.step()
    assert nn.functional.cross_entropy(model(x), labels) < before
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
    maps = timm.create_model("twod4", features_only=True, out_indices=(0, 1, 2))(x)
    assert [tuple(m.shape) for m in maps] == [(4, 24, 17, 17), (4, 24, 9, 9), (4, 48, 5, 5)]


def test_another_family_is_found_by_the_tools(family, tmp_path, monkeypatch):
    model = timm.create_model("twod4").eval()
    state = model.state_dict()
    write_model_folder(tmp_path / "model", "twod4", state, {"model": "twod4", TENSORS_SHA256: hash_tensors(state)})
    rows = {check.name: check for check in verify(str(tmp_path / "model"))}
    assert rows["loads"].ok
    assert rows["equivariance"].ok
    assert "not checked" in rows["statistics"].finding

    rng = np.random.default_rng(0)
    for name in "0123456789":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (33, 33, 3), dtype=np.uint8)).save(tmp_path / "data" / name / "a.png")
    weights, data = tmp_path / "model" / "model.safetensors", tmp_path / "data"
    command = ["rotate-eval", "--models", f"twod4={weights}", "--data", str(data), "-j", "0"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--angles", "0,90", "--device", "cpu"]) == 0
    assert (tmp_path / "rotate_eval" / "report.html").is_file()
