"""lightly: projection heads as wide as `num_features`."""

import pytest
import timm
import torch.nn as nn

heads = pytest.importorskip("lightly.models.modules.heads", reason="extra `libraries`: lightly")


def with_head(name, head, **kwargs):
    backbone = timm.create_model(name, num_classes=0, **kwargs)
    return nn.Sequential(backbone, head(backbone.num_features, 32, 16)).eval()


@pytest.mark.parametrize("head", ["SimCLRProjectionHead", "MoCoProjectionHead", "BYOLProjectionHead"])
def test_heads(moves, images, head):
    head = getattr(heads, head)
    assert moves(with_head("test_c8resnet", head, pretrained=True, map_pool="max")) < 1e-5
    assert moves(with_head("resnet18", head)) > 1e-3  # control
    with pytest.raises((RuntimeError, ValueError)):  # control: num_features counts equivariant channels
        with_head("test_c8resnet", head)(images)
