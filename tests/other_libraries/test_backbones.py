"""Libraries that build on a backbone: with map_pool their outputs are invariant; the controls lack it, or are plain."""

import pytest
import timm
import torch
import torch.nn as nn

from equivision_timm.models import Canonicalized

WRONG_WIDTH = (RuntimeError, ValueError)  # num_features counts equivariant channels


def test_fastai(library, moves, images):
    """The network that its vision learner builds, with a head of its own."""
    learner = library("fastai.vision.learner")

    def network(name, pretrained=True, **kwargs):
        return learner.create_timm_model(name, 5, pretrained=pretrained, **kwargs)[0].eval()

    model = network("test_c8resnet", map_pool="max")
    assert model(images).shape == (2, 5)
    assert moves(model) < 1e-5
    assert moves(network("test_c8resnet")) > 1e-2
    assert moves(network("resnet18", pretrained=False)) > 1e-3


def test_lightly(library, moves, images):
    """Projection heads as wide as `num_features`."""
    heads = library("lightly.models.modules.heads")

    def with_head(name, **kwargs):
        backbone = timm.create_model(name, num_classes=0, **kwargs)
        return nn.Sequential(backbone, heads.SimCLRProjectionHead(backbone.num_features, 32, 16)).eval()

    assert moves(with_head("test_c8resnet", pretrained=True, map_pool="max")) < 1e-5
    assert moves(with_head("resnet18")) > 1e-3
    with pytest.raises(WRONG_WIDTH):
        with_head("test_c8resnet")(images)


def test_open_clip(library, moves, images, invariant):
    """Its image tower on a timm trunk, which it builds from a name."""
    timm_model = library("open_clip.timm_model")

    def tower(name):
        return timm_model.TimmModel(name, 16, image_size=65, pool="avg", proj="linear", pretrained=True).eval()

    model = tower(invariant)
    assert model(images).shape == (2, 16)
    assert moves(model) < 1e-5
    assert moves(tower("test_c1resnet")) > 1e-2
    with pytest.raises(WRONG_WIDTH):
        tower("test_c8resnet")(images)


def test_segmentation_models(library, moves, images):
    """Encoders `tu-...`, and a network of one."""
    smp = library("segmentation_models_pytorch")
    kwargs = {"in_channels": 3, "depth": 5, "weights": None}
    model = smp.encoders.get_encoder("tu-test_c8resnet", map_pool="max", **kwargs).eval()
    without = smp.encoders.get_encoder("tu-test_c8resnet", **kwargs).eval()
    assert [found.shape[1] for found in model(images)] == list(model.out_channels)
    for level in range(1, 6):
        assert moves(lambda x, level=level: model(x)[level]) < 1e-5
        assert moves(lambda x, level=level: without(x)[level]) > 1e-2
    unet = smp.Unet("tu-test_c8resnet", encoder_weights=None, classes=2, map_pool="max").eval()
    assert unet(images[..., :64, :64]).shape == (2, 2, 64, 64)


@pytest.mark.parametrize("choice", ["hard", "soft"])
def test_canonicalized_unet(choice, library, images):
    """A plain Unet as a module: its masks move with the image; in training every trained parameter has a gradient."""
    unet = library("segmentation_models_pytorch").Unet("tu-test_resnet", encoder_weights=None, classes=2).eval()
    x, model = images[..., :64, :64], Canonicalized(unet, "c4", choice=choice).eval()
    with torch.no_grad():
        for k in range(4):
            torch.testing.assert_close(model(x.rot90(k, (2, 3))), model(x).rot90(k, (2, 3)), rtol=1e-3, atol=1e-4)
        assert (unet(x.rot90(1, (2, 3))) - unet(x).rot90(1, (2, 3))).abs().max() > 1e-2
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("task", ["SimCLRTask", "MoCoTask"])
def test_torchgeo(task, library, moves, images, invariant):
    """Self-supervised training of a backbone known by its name."""
    kwargs = {"in_channels": 3, "weights": True} | ({"version": 2} if task == "MoCoTask" else {})
    task = getattr(library("torchgeo.trainers"), task)
    model = task(model=invariant, **kwargs).eval()
    assert model.projection_head(model.backbone(images)).ndim == 2
    assert moves(lambda x: model.projection_head(model.backbone(x))) < 1e-5
    without = task(model="test_c8resnet", **kwargs).eval()
    with pytest.raises(WRONG_WIDTH):
        without.projection_head(without.backbone(images))


def test_transformers(library, moves, images, invariant):
    """TimmBackbone."""
    transformers = library("transformers")

    def backbone(name, **kwargs):
        config = transformers.TimmBackboneConfig(backbone=name, out_indices=(2, 4), use_pretrained_backbone=False)
        return transformers.TimmBackbone(config, **kwargs).eval()

    for model in (backbone("test_c8resnet", map_pool="max"), backbone(invariant)):
        assert [found.shape[1] for found in model(images).feature_maps] == list(model.channels)
        for level in range(2):
            assert moves(lambda x, level=level, model=model: model(x).feature_maps[level]) < 1e-5
    without = backbone("test_c8resnet")
    assert moves(lambda x: without(x).feature_maps[1]) > 1e-2


def test_torchmetrics(library):
    """The Frechet distance on features."""
    fid = library("torchmetrics.image.fid")

    def distance(model, real, fake):
        metric = fid.FrechetInceptionDistance(feature=model, input_img_size=(3, 65, 65))
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()

    def change(name, **kwargs):
        model = timm.create_model(name, pretrained=True, num_classes=0, **kwargs).eval()
        return abs(distance(model, real, fake.rot90(1, (2, 3))) / distance(model, real, fake) - 1)

    real, fake = torch.rand(64, 3, 65, 65), torch.rand(64, 3, 65, 65) ** 2
    assert change("test_c8resnet", map_pool="max") < 1e-3
    assert change("test_c1resnet") > 1e-2


@pytest.mark.parametrize("invariance", [True, False])
def test_padim(invariance, library, moves, invariant):
    """The features of anomalib's PaDiM."""
    padim = library("anomalib.models.image.padim.torch_model").PadimModel
    name, layers = invariant if invariance else "test_c8resnet", ["layer1", "layer2"]
    extract = padim(backbone=name, layers=layers, pre_trained=True, n_features=8).eval().feature_extractor
    for level in layers:
        error = moves(lambda x, level=level: extract(x)[level])
        assert error < 1e-5 if invariance else error > 1e-2


def test_patchcore(library, invariant):
    """anomalib's, trained on upright pieces of a wall: rotated pieces without a defect score as upright ones."""
    patchcore = library("anomalib.models.image.patchcore.torch_model").PatchcoreModel
    wall = torch.from_numpy(pytest.importorskip("skimage.data").brick().copy()).float() / 255
    pieces = torch.stack([wall[y : y + 65, x : x + 65] for y in range(0, 447, 55) for x in range(0, 447, 55)])
    pieces = pieces[:, None].expand(-1, 3, -1, -1)  # [81, 3, 65, 65]
    normal, good = pieces[:40], pieces[41:].contiguous()
    bad = good.clone()
    bad[:, :, 20:36, 25:41] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    separation, change = {}, {}
    for name in (invariant, "test_c8resnet"):
        model = patchcore(backbone=name, layers=["layer2", "layer3"], pre_trained=True).train()
        model(normal)
        model.subsample_embedding(0.2)
        model.eval()
        images = (good, good.rot90(1, (2, 3)).contiguous(), bad)
        with torch.no_grad():
            upright, turned, worst = (model(x).pred_score.flatten() for x in images)
        # how often a defective piece scores above a normal one
        separation[name] = [(worst[:, None] > scores).double().mean().item() for scores in (upright, turned)]
        change[name] = ((turned - upright).abs().max() / upright.max()).item()
    assert change[invariant] < 1e-4
    assert min(separation[invariant]) > 0.95
    assert change["test_c8resnet"] > 0.1
    assert separation["test_c8resnet"][1] < separation["test_c8resnet"][0] - 0.2
