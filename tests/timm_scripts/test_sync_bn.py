"""`--sync-bn`: SyncBatchNorm trains on GPUs only; tests/timm_contract has the conversion."""

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm trains on GPUs only, and there is none")
@torch.no_grad()
def test_one_process_trains_like_batch_norm() -> None:
    torch.manual_seed(0)
    model = timm.create_model("d4resnet18_fast", num_classes=5).train().cuda()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    expected = model(images)
    torch.testing.assert_close(convert_sync_batchnorm(model)(images), expected, atol=1e-4, rtol=1e-4)
