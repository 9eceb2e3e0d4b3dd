"""Running and training: compile, mixed precision, sync norm, weight decay; devices and folders."""

import copy
import json
import shutil
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from support.reference_data import image
from timm.layers import convert_sync_batchnorm
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2

from equivision_timm.layers import ConvNormAct
from equivision_timm.models.equivariant_resnet import BasicBlock

LABELS = torch.tensor([1, 3])


def create(name="d4resnet18_fast", **kwargs):
    torch.manual_seed(0)
    width = {"width": 2} if "50" in name else {}
    return timm.create_model(name, num_classes=10, **width, **kwargs)


def step(model, x, **kwargs):
    """Gradients of one backward pass."""
    model.zero_grad()
    F.cross_entropy(model(x).float(), LABELS).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # inside PyTorch's own compiler
def test_compiles_whole_forward_and_backward():
    # In float64: two images of 65 pixels leave batch norms of 18 numbers, which blow up float32's rounding
    model, x = create("test_d4resnet").double().train(), image((2, 3, 65, 65)).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = step(model, x)
    for found, gradient in zip(step(compiled, x), expected, strict=True):
        assert (found - gradient).abs().max() < 1e-3 * gradient.abs().max()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")  # inside PyTorch's own compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ to make machine code")
def test_a_block_compiles_to_machine_code():
    block, x = BasicBlock(2, 2, partial(ConvNormAct, group="c4")).train(), torch.randn(2, 8, 9, 9)
    block.conv1.conv.strategy, block.conv2.conv.strategy = "expand", "block_diagonal"
    gradients = []
    for run in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        run(x).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "memory_format"),
    [
        ("test_resnet", torch.float16, torch.channels_last),  # the control
        ("test_c8resnet", torch.float16, torch.channels_last),
        ("test_c8resnet", torch.bfloat16, torch.contiguous_format),
    ],
)
def test_scaled_gradients_in_mixed_precision(name, dtype, memory_format):
    """A step with `GradScaler`: gradients as in float32 but for the precision, and the weights move along them."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, zero_init_last=False).to(memory_format=memory_format)
    x, labels = image((4, 3, 65, 65)).contiguous(memory_format=memory_format), torch.arange(4)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), labels).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=256)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    moved = (before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])) / 0.1
    assert F.cosine_similarity(moved, expected, dim=0) > (0.99 if dtype == torch.float16 else 0.9)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_every_norm_becomes_a_sync_norm_inside_its_field_norm(convert):
    model = create()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    state = model.state_dict()
    converted = convert(model)
    assert {name for name, module in converted.named_modules() if isinstance(module, nn.SyncBatchNorm)} == names
    assert len(names) == 20
    assert all(name.endswith("norm.per_field") for name in names)
    assert list(converted.state_dict()) == list(state)


@pytest.mark.parametrize(("name", "features_only"), [("d4resnet18_fast", False), ("c8resnet50_fast", True)])
def test_gradient_checkpointing_changes_no_gradient(name, features_only):
    model, x = create(name, features_only=features_only).train(), image((2, 3, 33, 33))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output = model(x)
        loss = sum(m.pow(2).mean() for m in output) if features_only else F.cross_entropy(output, LABELS)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_weight_decay_and_layer_decay_reach_the_coefficients():
    model = create()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        decays = name.endswith("conv.weight") or name == "fc.weight"
        assert groups[id(parameter)]["weight_decay"] == (0.05 if decays else 0), name
    layers = ("conv1.conv", *(f"layer{stage}.0.conv1.conv" for stage in (1, 2, 3, 4)), "fc")
    scales = [groups[id(model.get_parameter(f"{name}.weight"))]["lr_scale"] for name in layers]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6
    assert scales[-1] == 1


@pytest.mark.parametrize("name", ["d4resnet18_fast", "test_d4vit", "test_d4convnext"])
def test_from_the_meta_device_to_the_same_network(name):
    expected, x = create(name).eval(), image((2, 3, 64, 64))
    with torch.device("meta"):
        model = create(name).eval()
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor.data, 77)
    model.init_weights()
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    for (key, found), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        spread, chance = reference.std(correction=0).item(), 4 / reference.numel() ** 0.5
        assert found.mean().item() == pytest.approx(reference.mean().item(), abs=0.01 + chance * spread), key
        assert found.std(correction=0).item() == pytest.approx(spread, rel=0.1 + chance), key
    with torch.no_grad():
        assert model(x).std().item() == pytest.approx(expected(x).std().item(), rel=0.8)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_device_and_type_of_every_tensor(device, dtype):
    model = create(device=device, dtype=dtype)
    tensors = (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()))
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {(device, dtype)}
    model.reset_classifier(3)
    assert model.fc.weight.dtype == dtype


def test_round_trip_through_a_local_folder(tmp_path):
    arguments = dict(group_pool="avg", act_layer="silu", drop_path_rate=0.1, output_stride=16, in_chans=1)
    model = create(**arguments).eval()
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("d4resnet18_fast", 10)
    assert config["num_features"] == model.num_features
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), image((1, 1, 65, 65))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
