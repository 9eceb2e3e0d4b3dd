"""Where weights come from and go to: the meta device, other image channels, files and folders."""

import json

import pytest
import timm
import torch
from support.reference_data import image
from timm.models._hub import save_for_hf

import equivision_timm  # noqa: F401  (registers the models)

NAMES = ("d4resnet18_fast", "c8resnet50_fast")


def create(name="d4resnet18_fast", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()


@pytest.mark.parametrize("name", NAMES)
def test_from_the_meta_device_to_the_same_network(name):
    expected, x = create(name), image((2, 3, 65, 65))
    with torch.device("meta"):
        model = create(name)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor.data, 77)
    model.init_weights()
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    for (key, found), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert found.mean().item() == pytest.approx(reference.mean().item(), abs=0.05), key
        assert found.std(correction=0).item() == pytest.approx(reference.std(correction=0).item(), rel=0.2), key
    with torch.no_grad():
        assert model(x).std().item() == pytest.approx(expected(x).std().item(), rel=0.5)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("device_and_type", [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_device_and_type_of_every_tensor(device_and_type):
    device, dtype = device_and_type
    model = create(device=device, dtype=dtype)
    tensors = (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()))
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {(device, dtype)}
    classifier_of = timm.create_model("d4resnet18_fast", device=device, dtype=dtype)
    classifier_of.reset_classifier(3)
    assert classifier_of.fc.weight.dtype == dtype


def test_round_trip_through_a_local_folder(tmp_path):
    arguments = dict(group_pool="avg", act_layer="silu", drop_path_rate=0.1, output_stride=16, in_chans=1)
    model = create(num_classes=7, **arguments)
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("d4resnet18_fast", 7)
    assert config["num_features"] == model.num_features
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), image((1, 1, 65, 65))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
