"""Adapted models against their definition, written out with torch.rot90 and flips, and timm's contract for them."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.models.byobnet import ByoBlockCfg
from timm.optim import create_optimizer_v2

from equivision_timm import assert_equivariant
from equivision_timm.layers.views import act, act_each
from equivision_timm.models import Canonicalized, EquivariantFPN, Symmetrized


def elements(group):
    """(p, k), r^k f^p, in the order of the package: rotations first, then reflections."""
    n = int(group[1:])
    return [(p, k) for p in range(2 if group[0] == "d" else 1) for k in range(n)]


def move(x, element, group):
    """r^k f^p x: the reflection first, then k rotations by 360 / n degrees (n = 1, 2 or 4), counter-clockwise."""
    p, k = element
    x = torch.flip(x, [-1]) if p else x
    return torch.rot90(x, k * 4 // int(group[1:]), (-2, -1))


def back(x, element, group):
    """(r^k f^p)^-1 x."""
    p, k = element
    x = torch.rot90(x, -k * 4 // int(group[1:]), (-2, -1))
    return torch.flip(x, [-1]) if p else x


def images(size=64, count=2):
    height, width = (size, size) if isinstance(size, int) else size
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def plain(name, **options):
    """A backbone with weights that leave no map zero, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def maps(model, x):
    return model.forward_intermediates(x, intermediates_only=True)


class Scores(nn.Module):
    """Scores of a group by their definition: a template compared with every view. Tests know its choice."""

    def __init__(self, group, sharpness=100.0, size=64):
        super().__init__()
        self.group, self.num_classes = group, len(elements(group))
        self.template = nn.Parameter(images(size, count=1)[0] * sharpness)

    def forward(self, x):
        views = [back(x, e, self.group) for e in elements(self.group)]
        return torch.stack([(view * self.template).mean((1, 2, 3)) for view in views], 1)


def close(actual, expected):
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def check_definition(model, backbone, x, p=None):
    """Logits and levels of an adapted `backbone`; p [B, |G|] are the weights of the views, None for regular fields."""
    group = model.group
    views = [back(x, e, group) for e in elements(group)]
    weights = torch.full((len(x), len(views)), 1 / len(views)) if p is None else p
    actual = model(x)
    assert close(actual, sum(weights[:, g, None] * backbone(view) for g, view in enumerate(views)))
    assert close(model.forward_head(model.forward_features(x)), actual)
    for e in elements(group):
        assert close(model(move(x, e, group)), actual)

    by_view, levels = [maps(backbone, view) for view in views], maps(model, x)
    for level, (info, map_) in enumerate(zip(model.feature_info, levels, strict=True)):
        moved = torch.stack([move(by_view[g][level], e, group) for g, e in enumerate(elements(group))], 2)
        if p is None:
            assert info["group"] == group
            wanted = moved.flatten(1, 2)  # channel = c * |G| + g
        else:
            assert info["group"] == "c1"
            wanted = torch.einsum("bcghw,bg->bchw", moved, p)
        assert map_.shape[1] == info["num_chs"]
        assert close(map_, wanted)


SMALL_SWIN = {"img_size": 56, "window_size": 7, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
SMALL_CLIP = {"img_size": 64, "blocks": [ByoBlockCfg("bottle", 1, 64 * 2**i, min(i + 1, 2), br=0.25) for i in range(4)]}
EXACT = {
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 64},
    "test_vit2": {"img_size": 64},  # registers
    "resnet18": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "tf_efficientnet_lite0": {},
    "mobilenetv3_small_100": {},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,  # channels last
    "vit_small_patch16_dinov3": {"img_size": 64, "depth": 3},  # rotary embeddings, registers
    "resnet50_clip": SMALL_CLIP,  # attention pooling, which reads positions
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("group", ["c4", "d4"])
@torch.no_grad()
def test_symmetrized_is_its_definition(name, group):
    backbone, x = plain(name, **EXACT[name]), images(EXACT[name].get("img_size", 64))
    check_definition(Symmetrized(backbone, group).eval(), backbone, x)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "swin_tiny_patch4_window7_224", "resnet50_clip"])
@pytest.mark.parametrize("choice", ["hard", "soft"])
@torch.no_grad()
def test_canonicalized_is_its_definition(name, choice):
    size = EXACT[name].get("img_size", 64)
    backbone, scores, x = plain(name, **EXACT[name]), Scores("d4", size=size), images(size)
    model = Canonicalized(backbone, "d4", orientation=scores, choice=choice).eval()
    p = scores(x).softmax(1)  # [B, |G|]
    assert len(set(p.argmax(1).tolist())) > 1  # the images do not all take the same element
    check_definition(model, backbone, x, torch.eye(8)[p.argmax(1)] if choice == "hard" else p)
    levels = maps(model, x)
    for e in elements("d4"):
        for before, after in zip(levels, maps(model, move(x, e, "d4")), strict=True):
            assert close(after, move(before, e, "d4"))


@torch.no_grad()
def test_features_of_a_canonicalized_model_end_with_the_weights():
    model, x = Canonicalized(plain("test_resnet"), "c4", orientation=Scores("c4")).eval(), images()
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features == model.backbone.num_features + 4
    weights = features[:, -4:].roll(1, 1)
    turned = model.forward_features(torch.rot90(x, 1, (-2, -1)))
    assert torch.equal(turned, torch.rot90(torch.cat([features[:, :-4], weights], 1), 1, (-2, -1)))


@pytest.mark.parametrize("group", ["c2", "d1", "d2"])
@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": (64, 96)})])
@torch.no_grad()
def test_groups_without_quarter_turns_take_images_that_are_not_square(name, options, group):
    backbone, scores, x = plain(name, **options), Scores(group, size=(64, 96)), images((64, 96))
    check_definition(Symmetrized(backbone, group).eval(), backbone, x)
    soft = Canonicalized(backbone, group, orientation=scores, choice="soft").eval()
    check_definition(soft, backbone, x, scores(x).softmax(1))
    assert soft.is_exact((64, 96))
    with pytest.raises(ValueError, match="square"):
        Symmetrized(backbone, "c4").eval()(x)


@pytest.mark.parametrize("group", ["d4", "c8"])
def test_exact_sizes(group):
    """Quarter turns are exact beside eighth turns, too, which resample."""
    model = Symmetrized(plain("test_resnet"), group).eval()
    assert model.is_exact(64) == (group == "d4")
    assert not model.is_exact((64, 96))
    assert model.exact_sizes(38) == (38, 38)
    assert_equivariant(model, 38, 1e-5)
    with pytest.raises(AssertionError, match="not d4"):
        assert_equivariant(model.backbone, 38, 1e-5, group="d4")
    vit = Symmetrized("vit_tiny_patch16_224", group, img_size=32, depth=1)
    assert vit.exact_sizes(70) == (32, 32)
    assert not vit.is_exact(64)


def test_an_eighth_turn_is_half_a_quarter_turn():
    x = nn.functional.interpolate(images(8), (65, 65), mode="bicubic", align_corners=True)
    disc = torch.hypot(*torch.meshgrid(*[torch.linspace(-1, 1, 65)] * 2, indexing="ij")) < 0.8

    def error(actual, expected):
        return ((actual - expected) * disc).abs().max() / expected.abs().max()

    twice = act(act(x, 1, 8), 1, 8)
    assert error(twice, torch.rot90(x, 1, (-2, -1))) < 0.03
    assert error(act(act(x, 1, 8), 1, 8, inverse=True), x) < 0.03
    assert error(twice, torch.rot90(x, -1, (-2, -1))) > 0.3  # the control: the other direction
    masked = act(act(x * disc, 1, 8), 1, 8, inverse=True)
    assert masked[..., :8, :8].abs().max() == 0  # no reflection of the picture in the corners


@pytest.mark.parametrize(("group", "n", "reflections"), [("d4", 4, True), ("c8", 8, False), ("d8", 8, True)])
def test_every_image_may_have_its_own_element(group, n, reflections):
    order = n * (2 if reflections else 1)
    x = torch.randn(order, 2, 9, 9)
    for inverse in (False, True):
        each = act_each(x, torch.arange(order), n, inverse)
        for g in range(order):
            assert torch.equal(each[g], act(x[g : g + 1], g, n, inverse)[0])


# Pooling, training


@torch.no_grad()
def test_pooling_over_the_group():
    backbone, x = plain("test_resnet"), images()
    logits = torch.stack([backbone(back(x, e, "c4")) for e in elements("c4")])  # [|G|, B, classes]
    wanted = {"avg": logits.mean(0), "max": logits.amax(0), "prob": logits.softmax(-1).mean(0).log()}
    for group_pool, expected in wanted.items():
        actual = Symmetrized(backbone, "c4", group_pool).eval()(x)
        assert torch.allclose(actual, expected, atol=1e-5), group_pool
    soft = Canonicalized(backbone, "c4", "prob", Scores("c4"), choice="soft").eval()
    p = Scores("c4")(x).softmax(1).T
    assert torch.allclose(soft(x), (logits.softmax(-1) * p[..., None]).sum(0).log(), atol=1e-5)
    for group_pool in ("avg", "max"):  # embeddings are averaged
        backbone.reset_classifier(0)
        expected = torch.stack([backbone(back(x, e, "c4")) for e in elements("c4")]).mean(0)
        model = Symmetrized(backbone, "c4", group_pool).eval()
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert model(x).shape[1] == model.head_hidden_size
        assert torch.allclose(model.forward_head(model.forward_features(x), pre_logits=True), expected, atol=1e-6)


@torch.no_grad()
def test_chunks_change_nothing_and_bound_the_batch():
    x, seen = images(count=3), []
    backbone = plain("test_resnet")
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    expected = Symmetrized(backbone, "d4").eval()(x)
    for chunk, batches in ((3, [9, 9, 6]), (8, [24]), (0, [24])):
        seen.clear()
        assert close(Symmetrized(backbone, "d4", chunk=chunk).eval()(x), expected)
        assert seen == batches


def test_batch_norms_see_every_view_in_training():
    """So the statistics, and the output in train mode, do not depend on the pose of the images."""
    x = images(count=4)
    outputs, statistics = [], []
    for k in range(2):
        model = Symmetrized(plain("test_resnet"), "c4").train()
        outputs.append(model(torch.rot90(x, k, (-2, -1))))
        statistics.append(torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n]))
    assert torch.allclose(*outputs, atol=1e-4)
    assert torch.allclose(*statistics, atol=1e-5)


def test_one_view_an_image_in_training():
    backbone, x = plain("test_vit", img_size=64), images(count=64)
    model = Symmetrized(backbone, "d4", train_views=1)
    model.train()
    backbone.eval()
    logits = model(x)
    views = torch.stack([backbone(back(x, e, "d4")) for e in elements("d4")], 1)  # [B, |G|, classes]
    distance = (logits[:, None] - views).abs().amax(2)
    assert distance.amin(1).max() < 1e-4
    assert len(set(distance.argmin(1).tolist())) == 8  # every element is drawn
    model.eval()
    assert torch.allclose(model(x), views.mean(1), atol=1e-5)


def test_a_frozen_orientation_network_stays_in_eval_mode():
    for choice in ("hard", "soft"):
        model = Canonicalized("test_resnet", choice=choice).train()
        assert model.backbone.training
        assert {m.training for m in model.orientation.modules()} == {choice == "soft"}


@torch.no_grad()
def test_the_gate_leaves_doubtful_images_as_they_are():
    x, scores = images(), Scores("c4", sharpness=1.0)  # probabilities near 1/4
    backbone = plain("test_resnet")
    gated = Canonicalized(backbone, orientation=scores, gate=0.9).eval()
    assert torch.equal(gated(x), backbone(x))
    assert not gated.is_exact(64)
    sure = Canonicalized(backbone, orientation=Scores("c4", 1e4), gate=0.9).eval()
    assert not torch.equal(sure(x), backbone(x))


# timm's contract


@torch.no_grad()
def test_features_only_keeps_the_levels_of_the_backbone():
    for name, options, levels in (
        ("test_resnet", {}, [0, 1, 2, 3, 4]),
        ("vit_tiny_patch16_224", {"img_size": 32}, [9, 10, 11]),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, [0, 1, 2, 3]),
    ):
        model = timm.create_model("symmetrized", backbone=name, group="c4", features_only=True, **options)
        assert list(model.feature_info.out_indices) == levels
    levels = timm.create_model("canonicalized", backbone="test_resnet", features_only=True).eval()
    assert [y.shape[1] for y in levels(images())] == levels.feature_info.channels()
    with pytest.raises(ValueError, match="feature_cls"):
        timm.create_model("symmetrized", backbone="test_resnet", features_only=True, feature_cls="hook")
    encoder = timm.create_model("symmetrized", backbone="test_resnet", features_only=True, out_indices=(1, 2, 3, 4))
    pyramid, x = EquivariantFPN(encoder, num_classes=2).eval(), images(65)  # which takes the fields
    logits = pyramid(x)
    for e in elements("d4"):
        assert torch.allclose(pyramid(move(x, e, "d4")), move(logits, e, "d4"), atol=1e-5)


@torch.no_grad()
def test_modules_that_timm_does_not_know():
    """A segmentation network, a classifier without `num_classes`, and a network of timm without pooling."""
    segmenter = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    headless = plain("test_convnext", num_classes=0, global_pool="")  # whose head is a norm
    x = images()
    turned = torch.rot90(x, 1, (-2, -1))
    for network in (segmenter, headless):
        fields, model = Symmetrized(network, "c4").eval(), Canonicalized(network, orientation=Scores("c4")).eval()
        permuted = fields(x).unflatten(1, (-1, 4)).roll(1, 2).flatten(1, 2)
        assert torch.allclose(fields(turned), torch.rot90(permuted, 1, (-2, -1)), atol=1e-5)
        assert torch.allclose(model(turned), torch.rot90(model(x), 1, (-2, -1)), atol=1e-5)
        if network is headless:
            assert close(fields.forward_head(fields.forward_features(x)), fields(x))
            assert close(model.forward_head(model.forward_features(x)), model(x))
    classifier = nn.Sequential(segmenter, nn.AdaptiveAvgPool2d(3), nn.Flatten())
    for model in (Symmetrized(classifier, "c4"), Canonicalized(classifier, orientation=Scores("c4"))):
        assert model.eval()(x).shape == classifier(x).shape
        assert torch.allclose(model(turned), model(x), atol=1e-5)
    assert not torch.allclose(classifier(turned), classifier(x), atol=1e-2)  # the control


def test_layer_decay_and_weight_decay_reach_the_backbone():
    backbone, model = timm.create_model("test_vit"), Symmetrized("test_vit")
    wanted = group_parameters(backbone, backbone.group_matcher())
    found = group_parameters(model, model.group_matcher())
    assert {i: [f"backbone.{n}" for n in names] for i, names in wanted.items()} == found
    assert model.no_weight_decay() == {f"backbone.{n}" for n in backbone.no_weight_decay()}
    rates = {g["lr_scale"] for g in create_optimizer_v2(model, "sgd", 0.1, layer_decay=0.5).param_groups}
    assert len(rates) > 3


@torch.no_grad()
def test_reset_classifier():
    model, x = timm.create_model("d4sym_resnet18").eval(), images()
    assert model.group_pool == "prob"
    model.reset_classifier(5)
    assert (model.group_pool, model.num_classes, model(x).shape) == ("avg", 5, (2, 5))
    model.reset_classifier(0)
    assert model(x).shape == (2, 512)
    model.reset_classifier(0, "")
    fields = model(x)
    assert fields.shape == (2, 512 * 8, 2, 2)
    assert torch.equal(fields, model.forward_features(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("orientation", ["c4orient_tiny", "c4orient_lite0"])
@torch.no_grad()
def test_tracers_and_exporters(orientation):
    x, backbone, followed = images(33), plain("test_resnet"), orientation == "c4orient_tiny"
    orientation = timm.create_model(orientation).eval()
    for model in (
        Symmetrized(backbone, "d1"),
        Canonicalized(backbone, orientation=orientation),
        Canonicalized(backbone, "c4", "prob", orientation, choice="soft", chunk=2),
    ):
        expected = model.eval()(x)
        assert close(torch.export.export(model, (x,)).module()(x), expected)
        assert close(torch.jit.script(model)(x), expected)
        if followed:  # timm's padding of lite0 depends on sizes
            assert close(torch.fx.symbolic_trace(model)(x), expected)
