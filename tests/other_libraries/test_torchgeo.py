"""torchgeo: self-supervised training of a backbone known by its name alone."""

import pytest

trainers = pytest.importorskip("torchgeo.trainers", reason="extra `libraries`: torchgeo")


@pytest.mark.parametrize("task", ["SimCLRTask", "MoCoTask"])
def test_backbone_and_head(moves, images, invariant_folder, task):
    kwargs = {"in_channels": 3, "weights": True} | ({"version": 2} if task == "MoCoTask" else {})
    task = getattr(trainers, task)
    model = task(model=invariant_folder, **kwargs).eval()
    head = model.projection_head
    assert head(model.backbone(images)).ndim == 2
    assert moves(lambda x: head(model.backbone(x))) < 1e-5
    without = task(model="test_c8resnet", **kwargs).eval()
    with pytest.raises((RuntimeError, ValueError)):  # control: num_features counts equivariant channels
        without.projection_head(without.backbone(images))
