import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.layers import GroupPool
from equivision_timm.testing import angle_error, assert_equivariant, calibrate_norms, equivariance_error


class Constant(nn.Module):
    group, in_chans = "c4", 3

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((len(x), 5), self.value)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_output_that_says_nothing_is_refused(value):
    with pytest.raises(ValueError, match="the output of Constant is zero, not finite or does not depend on the image"):
        equivariance_error(Constant(value))


@pytest.mark.parametrize("argument", ["input_type", "output_type"])
def test_unknown_type(argument):
    with pytest.raises(ValueError, match=f"unknown {argument} 'vector': use one of"):
        equivariance_error(Constant(1.0), **{argument: "vector"})


@pytest.mark.parametrize("measure", [equivariance_error, assert_equivariant])
def test_a_module_that_says_neither_group_nor_channels(measure):
    pool = nn.AvgPool2d(3)
    with pytest.raises(ValueError, match="AvgPool2d has no attribute 'group': give group="):
        measure(pool, 9)
    with pytest.raises(ValueError, match="has no attribute 'in_chans': give in_channels="):
        measure(pool, 9, group="c4")
    measure(pool, 9, group="c4", in_channels=2, output_type="trivial")


def test_plain_network_is_rejected_and_the_mode_restored():
    model = timm.create_model("resnet18", num_classes=10).train()
    with pytest.raises(AssertionError, match=r"ResNet is not c4-equivariant at 65 x 65 pixels: .*\{1: .*, 2: .*, 3:"):
        assert_equivariant(model, 65, group="c4", in_channels=3)
    assert model.training
    assert_equivariant(model, 65, group="c1", in_channels=3)


def test_symmetry_that_the_group_lacks():
    model = timm.create_model("c4resnet18_fast", num_classes=10)
    assert_equivariant(model, 65)
    errors = equivariance_error(model, 65, group="d4")
    assert max(errors[g] for g in range(4)) < 1e-4
    assert min(errors[g] for g in range(4, 8)) > 1e-3


def test_even_sizes_are_not_exact():
    with pytest.raises(AssertionError, match="not d4-equivariant at 64 x 64 pixels"):
        assert_equivariant(timm.create_model("d4resnet18_fast", num_classes=10), 64)


def test_permutation_of_the_channels_counts():
    pool = GroupPool(4)
    kinds = {"group": "c4", "in_channels": 8, "size": 9, "input_type": "regular", "output_type": "trivial"}
    assert_equivariant(pool, **kinds)
    with pytest.raises(AssertionError, match="Sequential is not c4-equivariant"):
        assert_equivariant(nn.Sequential(nn.Conv2d(8, 8, 1), pool), **kinds)


def test_resampled_elements_of_smooth_fields_are_near():
    errors = equivariance_error(GroupPool(8), 65, "c8", "regular", "trivial", in_channels=16)
    assert errors[0] == 0
    assert max(errors.values()) < 0.3  # corners leave the image


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
    """One stage, a function of the image, that says it belongs to `group`."""

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


def test_maps_that_turn_with_the_image(photographs):
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


def test_networks_by_stage(photographs):
    torch.manual_seed(0)
    ours, plain = timm.create_model("c8resnet18_fast"), timm.create_model("resnet18").train()
    errors = {}
    for model in (ours, plain):
        calibrate_norms(model, photographs)
        errors[model] = angle_error(model, photographs, [0, 45, 90])
        assert list(errors[model]) == [level["module"] for level in model.feature_info]
    assert plain.training
    assert plain.layer1[0].bn1.training
    for stage, by_angle in errors[ours].items():
        assert by_angle[0] < 1e-6
        assert by_angle[90] < 1e-4
        assert errors[plain][stage][90] > 0.1
    assert errors[ours]["layer4"][45] > 0.5  # aliasing
    assert errors[ours]["act1"][45] < 0.3 * errors[ours]["layer4"][45]


def test_smooth_random_images_hide_the_fault(photographs):
    torch.manual_seed(0)
    model = timm.create_model("c8resnet18_fast")
    smooth = F.interpolate(torch.randn(2, 3, 5, 5), (97, 97), mode="bicubic", align_corners=True)
    errors = []
    for images in (photographs, smooth):
        calibrate_norms(model, images)
        errors.append(angle_error(model, images, [45])["layer1"][45])
    assert errors[1] < 0.5 * errors[0]


def test_calibrated_norms_have_the_statistics_of_the_images(photographs):
    model = timm.create_model("test_c8resnet").train()
    calibrate_norms(model, photographs)
    norm = model.conv1.norm.per_field
    assert norm.momentum == 0.1
    assert model.training
    seen = []
    norm.register_forward_hook(lambda _, args, output: seen.append(output))
    angle_error(model, photographs, [])  # what it shows the network
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen[0].var((0, 2, 3)) - 1).abs().max() < 1e-2
    with pytest.raises(ValueError, match="ConvNeXt has no batch norms to calibrate"):
        calibrate_norms(timm.create_model("test_convnext"), photographs)


def test_what_angle_error_refuses(photographs):
    model = Maps(lambda x: x)
    with pytest.raises(ValueError, match=r"expected square images .* got \[2, 3, 97, 90\]: crop them"):
        angle_error(model, photographs[..., 7:], [45])
    with pytest.raises(ValueError, match=r"angles \[nan\] are not all finite"):
        angle_error(model, photographs, [float("nan")])
    with pytest.raises(TypeError, match="Conv2d shows no maps of its stages"):
        angle_error(nn.Conv2d(3, 3, 1), photographs, [45])
    with pytest.raises(ValueError, match=r"the map of stage, .* is zero or not finite"):
        angle_error(Maps(lambda x: 0 * x), photographs, [45])
