"""torchmetrics: the Frechet distance on features of our models."""

import pytest
import timm
import torch

fid = pytest.importorskip("torchmetrics.image.fid", reason="extra `libraries`: torchmetrics[image]")


def distance(model, real, fake):
    metric = fid.FrechetInceptionDistance(feature=model, input_img_size=(3, 65, 65))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def test_frechet_distance():
    real, fake = torch.rand(64, 3, 65, 65), torch.rand(64, 3, 65, 65) ** 2
    model = timm.create_model("test_c8resnet", pretrained=True, num_classes=0, map_pool="max").eval()
    twin = timm.create_model("test_c1resnet", pretrained=True, num_classes=0).eval()
    ours, theirs = distance(model, real, fake), distance(twin, real, fake)
    assert abs(distance(model, real, fake.rot90(1, (2, 3))) / ours - 1) < 1e-3
    assert abs(distance(twin, real, fake.rot90(1, (2, 3))) / theirs - 1) > 1e-2  # control: the plain twin
