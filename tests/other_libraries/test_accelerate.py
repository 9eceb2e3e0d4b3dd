"""accelerate: models built empty, and weights that come only when they are used."""

import pytest
import timm
import torch

accelerate = pytest.importorskip("accelerate", reason="extra `libraries`: accelerate")


@pytest.mark.parametrize("name", ["resnet18", "test_c8resnet"])
def test_empty_weights(images, name):
    full = timm.create_model(name).eval()
    with accelerate.init_empty_weights(include_buffers=True):
        model = timm.create_model(name).eval()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(full.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(model(images), full(images))


@pytest.mark.parametrize("name", ["resnet18", "test_c8resnet"])
def test_offload(images, name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        expected = model(images)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert any(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "test_c8resnet"])
def test_dispatch(images, name, tmp_path):
    """Children on the processor and on disk by turns."""
    model = timm.create_model(name).eval()
    places = {child: ("cpu", "disk")[i % 2] for i, (child, _) in enumerate(model.named_children())}
    with torch.no_grad():
        expected = model(images)
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        assert any(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
