"""Measuring equivariance: exact networks pass, everything else is found, and the model is left as it was."""

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.layers import GroupPool
from equivision_timm.testing import angle_error, assert_equivariant, equivariance_error

POOL = {"group": "c4", "in_channels": 8, "size": 9, "input_type": "regular", "output_type": "trivial"}


class Function(nn.Module):
    """A function of the image as a network of its own group."""

    group, in_chans = "c4", 3

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: torch.ones(len(x), 5), "depend"),
        (lambda x: torch.arange(len(x)).float()[:, None], "depend"),  # only of the place in the batch
        (lambda x: x.mean((2, 3)) * float("nan"), "finite"),
        (lambda x: F.pad(x.mean((2, 3)), [0, 1], value=float("inf")), "finite"),
    ],
    ids=["constant", "batch", "nan", "inf"],
)
def test_output_of_which_nothing_can_be_measured(function, word):
    assert_equivariant(Function(lambda x: x.mean((2, 3))))
    with pytest.raises(ValueError, match=word):
        assert_equivariant(Function(function))


def test_arguments_that_are_unknown_or_missing():
    assert_equivariant(GroupPool(4), **POOL)
    for argument in ("input_type", "output_type"):
        with pytest.raises(ValueError, match=argument):
            equivariance_error(GroupPool(4), **{**POOL, argument: "vector"})
    pool = nn.AvgPool2d(3)
    with pytest.raises(ValueError, match="group="):
        assert_equivariant(pool, 9)
    with pytest.raises(ValueError, match="in_channels="):
        assert_equivariant(pool, 9, group="c4")
    assert_equivariant(pool, 9, group="c4", in_channels=2, output_type="trivial")


def test_plain_network_is_rejected_whatever_its_bias():
    model = timm.create_model("test_resnet", num_classes=10)
    nn.init.constant_(model.fc.bias, 1e4)
    with pytest.raises(AssertionError, match=r"c4.* from input_type 'trivial' to output_type 'invariant'"):
        assert_equivariant(model, 65, group="c4", in_channels=3)
    assert min(list(equivariance_error(model.double(), 65, "c4", in_channels=3).values())[1:]) > 0.01
    assert_equivariant(model, 65, group="c1", in_channels=3)


def test_hybrid_with_small_scales_is_rejected():
    model = timm.create_model("test_d4vit", invariants="", init_values=1e-4)
    with pytest.raises(AssertionError):
        assert_equivariant(model, 64)
    for name, parameter in model.double().named_parameters():  # no longer one number, and in double precision
        if "gamma" in name:
            nn.init.normal_(parameter, std=1e-4)
    assert min(list(equivariance_error(model, 64).values())[1:]) > 1e-3
    assert_equivariant(timm.create_model("test_d4vit", init_values=1e-4), 64)


def test_broken_layer_in_a_branch_that_is_switched_off():
    model = timm.create_model("test_c8resnet", zero_init_last=True)
    assert_equivariant(model, 65)
    conv = model.layer1[0].conv1.conv
    model.layer1[0].conv1.conv = nn.Conv2d(conv.in_fields * 8, conv.out_fields * 8, 3, padding=1)
    with pytest.raises(AssertionError):
        assert_equivariant(model, 65)


def test_symmetry_that_the_group_lacks():
    errors = equivariance_error(timm.create_model("c4resnet18_fast", num_classes=10, width=2), 65, group="d4")
    assert max(errors[g] for g in range(4)) < 1e-4
    assert min(errors[g] for g in range(4, 8)) > 1e-3


def test_even_sizes_are_not_exact():
    with pytest.raises(AssertionError, match="sizes are 33 and 65"):
        assert_equivariant(timm.create_model("test_d4resnet"), 64)
    assert_equivariant(timm.create_model("test_d4resnet", even="box"), 64)


def test_measuring_leaves_the_model_as_it_was():
    model = timm.create_model("test_c8resnet", zero_init_last=True).train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert_equivariant(model, 65)
    angle_error(model, torch.rand(1, 3, 65, 65), [45])
    with pytest.raises(ValueError, match="finite"):
        angle_error(model, torch.full((1, 3, 65, 65), float("nan")), [45])
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.fixture(scope="module")
def photographs():
    """Astronaut and coffee, [2, 3, 97, 97], normalised."""
    data = pytest.importorskip("skimage.data", reason="photographs for this test come from scikit-image")
    images = []
    for photograph in (data.astronaut(), data.coffee()):
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None] / 255  # [1, 3, H, W]
        side = min(pixels.shape[2:])
        images.append(F.interpolate(pixels[..., :side, :side], (97, 97), mode="bilinear", antialias=True))
    return (torch.cat(images) - 0.45) / 0.225


class Maps(nn.Module):
    """One stage, a function of the image, with fields of `group`."""

    def __init__(self, function, group="c1"):
        super().__init__()
        self.function = function
        self.feature_info = [{"module": "stage", "group": group}]

    def forward_intermediates(self, x, intermediates_only):
        return [self.function(x)]


def _fields(x):
    """An exact C8 field: the derivatives of a smoothed image in eight directions, without any aliasing."""
    smooth = x
    for _ in range(8):
        smooth = F.avg_pool2d(smooth, 3, 1, 1)
    y, x = torch.gradient(smooth[:, :1], dim=(2, 3))
    angles = torch.arange(8) * torch.pi / 4
    return x * torch.cos(angles)[:, None, None] - y * torch.sin(angles)[:, None, None]  # y points down


def test_maps_that_rotate_with_the_image(photographs):
    angles = [-30, 22.5, 45, 90, 100]
    for function, group in ((_fields, "c8"), (lambda x: F.avg_pool2d(x, 9, 1, 4), "c1")):
        errors = angle_error(Maps(function, group), photographs, angles)["stage"]
        assert list(errors) == angles
        assert max(errors.values()) < 0.06
        assert errors[90] < 1e-5
    wrong = angle_error(Maps(_fields, "c1"), photographs, angles)["stage"]  # the channels must move, too
    assert min(wrong.values()) > 0.2
    backwards = angle_error(Maps(lambda x: _fields(x).flip(1), "c8"), photographs, [45])["stage"]
    assert backwards[45] > 0.2


def test_refused_by_angle_error():
    for function, word in (
        (lambda x: 0 * x, "depend"),
        (lambda x: torch.ones(len(x), 8, 9, 9), "depend"),
        (lambda x: F.avg_pool2d(x, 9) / 0, "finite"),
    ):
        with pytest.raises(ValueError, match=word):
            angle_error(Maps(function), torch.rand(2, 3, 97, 97), [45])
