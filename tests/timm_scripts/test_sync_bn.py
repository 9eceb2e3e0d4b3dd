"""`--sync-bn`: what timm's conversion makes of our norms. Running it takes a GPU, so the forward pass in training
mode is checked where there is one."""

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm

from equivision_timm.layers import FieldNorm


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("d4resnet18_fast", num_classes=5).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))  # running statistics other than 0 and 1
    return model


@torch.no_grad()
def test_conversion_keeps_fields_weights_and_logits() -> None:
    model = _model().eval()
    images = torch.randn(2, 3, 64, 64)
    expected, state = model(images), {name: value.clone() for name, value in model.state_dict().items()}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    converted = convert_sync_batchnorm(model).eval()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    wrapped = [module for module in converted.modules() if isinstance(module, FieldNorm)]
    assert all(isinstance(norm.per_field, nn.SyncBatchNorm) for norm in wrapped)  # one statistic per field
    assert all(norm.per_field.num_features * norm.order % 8 == 0 for norm in wrapped)
    assert state.keys() == converted.state_dict().keys()
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in state.items())
    torch.testing.assert_close(converted(images), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm trains on GPUs only, and there is none")
@torch.no_grad()
def test_one_process_trains_like_batch_norm() -> None:
    model = _model().cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    expected = model(images)
    converted = convert_sync_batchnorm(_model().cuda())
    torch.testing.assert_close(converted(images), expected, atol=1e-4, rtol=1e-4)
