"""The four recipes of the README's development part, each done outside the package."""

import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import build_model_with_cfg
from timm.models._hub import save_for_hf

from equivision_timm import (
    ConvNormAct,
    EquivariantBackbone,
    Group,
    SteerableConv2d,
    assert_equivariant,
    equivariance_error,
    model_names,
)
from equivision_timm.cli.main import main
from equivision_timm.layers.strategies import STRATEGIES, Strategy, register
from equivision_timm.models.variants import Variant, forget, register_family


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

    def __init__(self, group, width, num_classes=10, in_chans=3, global_pool="avg", device=None, dtype=None, **kwargs):
        super().__init__(group, in_chans, kwargs.pop("map_pool", ""))
        dd = {"device": device, "dtype": dtype}
        stem = ConvNormAct(in_chans, width, 5, group, "trivial", stride=2, **dd)
        self.add_level("stem1", stem, width, reduction=2)
        self.pool = nn.Identity()
        self.add_level("layer1", Block(width, width, group, **dd), width, reduction=4)
        self.add_level("layer2", Block(width, 2 * width, group, **dd), 2 * width, reduction=8)
        self.create_head(num_classes, global_pool, "max", "auto", **kwargs)

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


CFG = {"num_classes": 10, "input_size": (3, 33, 33), "first_conv": "stem1.conv", "classifier": "fc"}


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


def test_another_kernel_size():
    layer = SteerableConv2d(2, 3, 7, "d6", stride=2)
    kind = {"input_type": "regular", "output_type": "regular", "group": "d6", "in_channels": 24}
    assert_equivariant(layer, 13, **kind)
    broken = nn.Conv2d(24, 36, 7, 2, 3, bias=False)  # the control
    with pytest.raises(AssertionError, match="d6"):
        assert_equivariant(broken, 13, **kind)


def test_another_strategy():
    class InHalves(Strategy):
        name = "in halves"
        factor = 1.0

        def supports(self, layer):
            return "the group is odd" if layer.order % 2 else None

        def conv2d(self, x, weight, layer):
            halves = [STRATEGIES["expand"].conv2d(half, weight, layer) for half in x.split((len(x) + 1) // 2)]
            return torch.cat(halves) * self.factor

    register(InHalves)
    try:
        model, x = timm.create_model("test_c8resnet", pretrained=True).eval(), torch.rand(3, 3, 65, 65)
        expected = model(x)
        model.set_conv_strategy("in halves")
        assert set(model.conv_strategies(size=65).values()) == {"expand", "in halves"}
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        InHalves.factor = 1.01  # the control
        assert (model(x) - expected).abs().max() > 1e-3
        with pytest.raises(ValueError, match="odd"):
            SteerableConv2d(1, 1, 3, "c3", strategy="in halves")
    finally:
        del STRATEGIES["in halves"]
    with pytest.raises(ValueError, match="in halves"):
        model.set_conv_strategy("in halves")


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


def test_another_family_is_found_by_the_commands(family, tmp_path, monkeypatch, capsys):
    folder, data = tmp_path / "model", tmp_path / "data"
    save_for_hf(timm.create_model("twod4"), str(folder), safe_serialization=True)
    main(["verify", str(folder)])
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip())
    assert all(found[check].startswith("ok") for check in ("loads", "equivariance")), found
    rng = np.random.default_rng(0)
    for name in "0123456789":
        (data / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (33, 33, 3), dtype=np.uint8)).save(data / name / "a.png")
    weights = folder / "model.safetensors"
    command = f"rotate-eval --models twod4={weights} --data {data} -j 0 --angles 0,90 --device cpu"
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    assert (tmp_path / "rotate_eval" / "rotation.png").is_file()
