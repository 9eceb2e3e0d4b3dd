"""Segmentation: the mask rotates and reflects with the image, exactly; a broken layer is noticed."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.reference_data import image
from support.small_models import stirred
from timm.utils import reparameterize_model

from equivision_timm import EquivariantFPN, Group, equivariance_error

MODELS = {"test_c8resnet": {}, "test_d4resnet": {}, "d8resnetaf18_fast": {"width": 1}}
X = image((2, 3, 65, 65))


def create(name="test_d4resnet", num_classes=3, fields=4, size=65, **kwargs):
    """A pyramid whose norms have statistics, scales and shifts of their own."""
    encoder = timm.create_model(name, features_only=True, **{**MODELS.get(name, {}), **kwargs})
    return stirred(EquivariantFPN(encoder, num_classes, fields), size)


def errors(model, size=65, group=None):
    """By element of the pixel grid: how far the mask of the moved image is from the moved mask."""
    found = equivariance_error(model, size, group, output_type="trivial", in_channels=3)
    return [found[g] for g in Group.from_name(group or model.group).grid_elements if g]


@pytest.mark.parametrize("name", MODELS)
def test_the_mask_moves_with_the_image(name):
    model = create(name)
    assert len(errors(model)) == (3 if name == "test_c8resnet" else 7)
    assert max(errors(model)) < 1e-5


def test_rectangles_and_statistics_of_the_batch():
    model, x = create(), image((2, 3, 65, 97))
    for training in (False, True):
        mask, moved = model.train(training)(x), model(x.rot90(1, (2, 3)))
        assert moved.shape == (2, 3, 97, 65)
        assert (moved - mask.rot90(1, (2, 3))).abs().max() < 1e-5 * mask.abs().max()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"out_indices": (1, 3)},
        {"out_indices": (-1,), "feature_cls": "fx"},
        {"output_stride": 8, "feature_cls": "hook"},
        {"output_stride": 16, "out_indices": 3, "feature_cls": "getter"},
    ],
)
def test_other_levels_and_ways_to_take_them(kwargs):
    model = create(**kwargs)
    assert max(errors(model)) < 1e-5
    assert len(model.levels) == len(model.encoder.feature_info.out_indices)


def enlarged(model, side, size):
    """The first row of a mask of `size` pixels where the classifier gives the numbers of the columns, 0 to side - 1."""
    columns = torch.arange(float(side)).expand(1, 1, side, side)
    model.classifier.register_forward_hook(lambda *_: columns)
    return model(torch.zeros(1, 3, size, size))[0, 0, 0]


def test_where_values_lie_on_the_mask():
    """Patches cover the image: values lie between their centres, not between the borders; strides keep the borders."""
    model = create("test_d4vit", size=64, out_indices=(0, 1))
    assert max(errors(model, 64)) < 1e-5
    row = enlarged(model, 4, 64)
    torch.testing.assert_close((row[7::16] + row[8::16]) / 2, torch.arange(4.0), rtol=0, atol=0.02)  # 0.36 for borders
    torch.testing.assert_close(enlarged(create(), 33, 65), torch.arange(65.0) / 2)


def test_a_broken_layer_is_noticed():
    for broken in (
        {"levels.2.smooth.conv": nn.Conv2d(32, 32, 3, padding=1)},
        {"encoder.layer2.0.conv1.conv": nn.Conv2d(32, 64, 3, stride=2, padding=1)},
        {"group_pool": nn.Identity(), "classifier": nn.Conv2d(32, 3, 1)},
    ):
        model = create()
        for place, layer in broken.items():
            model.set_submodule(place, layer)
        assert min(errors(model)) > 1e-3


def test_nearest_neighbours_and_other_symmetries_are_noticed(monkeypatch):
    model, interpolate = create("test_c8resnet"), F.interpolate
    assert min(errors(model, group="d1")) > 1e-3
    monkeypatch.setattr(F, "interpolate", lambda x, size, **_: interpolate(x, size))
    assert max(errors(model)) > 1e-3


def test_sizes_that_are_not_exact():
    model = create()
    with torch.no_grad():
        assert model(image((1, 3, 64, 70))).shape == (1, 3, 64, 70)
    assert max(errors(model, 64)) > 1e-3
    box = create(even="box")
    assert max(max(errors(box, size)) for size in (64, 65, 70)) < 1e-5


def test_encoders_without_regular_fields_of_one_group_are_refused():
    for kwargs, word in (
        ({"name": "test_resnet"}, "'c1'"),
        ({"name": "test_c1resnet"}, "'c1'"),
        ({"map_pool": "max"}, "map_pool"),
        ({"name": "test_d4vit"}, "out_indices"),
    ):
        with pytest.raises(ValueError, match=word):
            create(**kwargs)
    encoder = timm.create_model("test_d4resnet", features_only=True)
    encoder.feature_info.info[1]["group"] = "c4"
    with pytest.raises(ValueError, match="'c4'"):
        EquivariantFPN(encoder, 1)
    with pytest.raises(TypeError, match="EquivariantResNet"):
        EquivariantFPN(timm.create_model("test_d4resnet"), 1)


def test_training():
    model = create().train()
    mask = (X.mean(1) > X.mean()).long()  # [B, H, W]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(X), mask)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert max(errors(model)) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_deployed_forms():
    model, larger = create(out_indices=(0, 2)), image((2, 3, 97, 97))
    expected = model(X)
    fused = reparameterize_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(X), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(model)(X), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), expected, rtol=1e-4, atol=1e-5)
    n = torch.export.Dim("n", min=1, max=8)
    program = torch.export.export(model, (X,), dynamic_shapes=({2: 32 * n + 1, 3: 32 * n + 1},))  # the exact sizes
    torch.testing.assert_close(program.module()(X), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(program.module()(larger), model(larger), rtol=1e-4, atol=1e-5)
