"""Our features, kernels and layers against escnn's; skipped without it."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from support.cases import FROZEN, GROUPS
from support.kernels import irrep_energy
from support.reference_data import FOLDER, sign_patterns

from equivision_timm.errors import install_command
from equivision_timm.escnn_interop import field_type, gspace, to_geometric_tensor
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel
from equivision_timm.layers import ConvNormAct, GroupPool

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "escnn_kernels.py"))
HAS_ESCNN = importlib.util.find_spec("escnn") is not None
needs_escnn = pytest.mark.skipif(not HAS_ESCNN, reason="compares with escnn: pip install '.[escnn]'")


@pytest.mark.skipif(HAS_ESCNN, reason="escnn is installed; this is about the message without it")
@pytest.mark.parametrize("function", [gspace, lambda group: to_geometric_tensor(torch.zeros(1, 4, 3, 3), group)])
def test_message_without_escnn(function):
    with pytest.raises(ImportError, match=re.escape(install_command("escnn"))):
        function("c4")


@needs_escnn
@pytest.mark.parametrize("group", GROUPS)
def test_geometric_tensor_has_our_transform(group):
    parsed, space = Group.from_name(group), gspace(group)
    features = torch.randn(2, 3 * parsed.order, 7, 7)
    tensor, elements = to_geometric_tensor(features, group), list(space.testing_elements)
    assert tensor.tensor is features
    assert len(elements) == parsed.order
    assert list(tensor.type.representations) == 3 * [space.regular_repr]
    for g in parsed.grid_elements:
        expected = parsed.transform_fields(features, g)
        torch.testing.assert_close(tensor.transform(elements[g]).tensor, expected, rtol=1e-4, atol=1e-5)


@needs_escnn
@pytest.mark.parametrize("group", ["d4", "d1"])
def test_maps_of_vision_transformers_move_as_geometric_tensors(group):
    """The map of g x is the tensor of the map of x, transformed by escnn; an escnn layer takes it.

    Controls: the same channels in another order, and the ordinary blocks' maps.
    """
    import escnn.nn as enn
    import timm

    parsed = Group.from_name(group)
    keywords = {"group": group, "img_size": 96, "embed_dim": 6 * parsed.order, "num_heads": 3, "depth": 3}
    model = timm.create_model("test_d4vit", equivariant_depth=2, **keywords).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and scales other than 0 and 1

    def maps(x):
        with torch.no_grad():
            return model.forward_intermediates(x, intermediates_only=True)  # [B, 6 * order, 6, 6] each

    def error(tensor, element, moved):
        return (tensor.transform(element).tensor - moved).abs().max() / moved.abs().max()

    x = torch.randn(2, 3, 96, 96)
    conv, wrong_order, ordinary = enn.R2Conv(field_type(group, 6), field_type(group, 2), 3, padding=1), [], []
    for element, g in zip(gspace(group).testing_elements, parsed.grid_elements, strict=True):
        *pairs, last = zip(maps(x), maps(parsed.transform_image(x, g)), strict=True)
        for features, moved in pairs:
            tensor = to_geometric_tensor(features, group)
            assert error(tensor, element, moved) < 1e-4
            assert error(conv(tensor), element, conv(to_geometric_tensor(moved, group)).tensor) < 1e-4
            elementwise = [y.unflatten(1, (6, parsed.order)).transpose(1, 2).flatten(1, 2) for y in (features, moved)]
            wrong_order.append(error(to_geometric_tensor(elementwise[0], group), element, elementwise[1]))
        ordinary.append(error(to_geometric_tensor(last[0], group), element, last[1]))
    assert max(wrong_order) > 0.1 < max(ordinary)


@needs_escnn
@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_sampled_kernels_are_ours_but_for_known_signs(group, size, input_type):
    kernel, key = Kernel(group, size, input_type), f"{group}/{size}x{size}/{input_type}"
    found = SCRIPT["sample_kernels"](kernel)
    signs = SCRIPT["signs"](kernel, found["kernels"])
    assert found["elements"] == json.loads((FOLDER.parent / "escnn" / "elements.json").read_text())["elements"][key]
    assert (found["he_std"] - load_kernel_basis(kernel).he_std).abs().max() < 1e-6
    known = [pattern.get(key, []) for pattern in sign_patterns()]
    assert (signs < 0).nonzero().flatten().tolist() in known or (size == 3 and input_type == "trivial")  # not recorded


@needs_escnn
@pytest.mark.parametrize("size", ["3-regular-3", "5-regular", "7-trivial-3"])
@pytest.mark.parametrize("group", ["c3", "c4", "c6", "c16", "d1", "d2", "d3"])
def test_orthonormal_coordinates_span_the_kernels_of_escnn(group, size):
    kernel = Kernel.from_name(f"{group}-{size}")
    found, basis = SCRIPT["sample_kernels"](kernel), load_kernel_basis(kernel)
    assert found["rings"] == [(ring.radius, ring.sigma) for ring in kernel.rings]
    expected, flat = found["kernels"].double().flatten(1), basis.sample().flatten(1)
    assert expected.shape == flat.shape
    assert (expected - expected @ flat.T @ flat).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(expected, rtol=1e-4) == len(flat)
    assert (expected - expected @ flat[:-1].T @ flat[:-1]).abs().max() > 1e-3
    # and at initialisation each pair of irreps gets the same variance
    variances = [irrep_energy(kernel, found["kernels"].double())[0] @ found["he_std"].double() ** 2]
    variances.append(irrep_energy(kernel, basis.sample())[0] @ basis.he_std**2)
    torch.testing.assert_close(*variances, rtol=1e-4, atol=1e-6)


@needs_escnn
@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_forward_and_gradient_equal_those_of_escnn(group, size, input_type):
    import escnn.nn as enn

    order, space = Group.from_name(group).order, gspace(group)
    in_type = enn.FieldType(space, 3 * [space.trivial_repr if input_type == "trivial" else space.regular_repr])
    out_type = field_type(group, 2)
    conv = enn.R2Conv(in_type, out_type, size, padding=size // 2, stride=2, bias=False, initialize=False)
    reference = enn.SequentialModule(conv, enn.InnerBatchNorm(out_type), enn.GroupPooling(out_type))
    module = torch.nn.Sequential(ConvNormAct(3, 2, size, group, input_type, stride=2, act_layer=None), GroupPool(order))

    kernel = Kernel(group, size, input_type)
    signs = SCRIPT["signs"](kernel, SCRIPT["sample_kernels"](kernel)["kernels"]).float()
    weight, norm = module[0].conv.weight, module[0].norm.per_field
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    (escnn_norm,) = (m for m in reference.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    escnn_norm.load_state_dict(norm.state_dict())
    with torch.no_grad():
        conv.weights.copy_((weight[..., 0] * signs).flatten())  # (o, i, b)

    inputs = [torch.randn(4, in_type.size, 9, 9, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    found, expected = module(inputs[0]), reference(enn.GeometricTensor(inputs[1], in_type)).tensor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in (
        (inputs[0].grad, inputs[1].grad),
        (weight.grad[..., 0].flatten(), conv.weights.grad * signs.repeat(6)),
        (norm.weight.grad, escnn_norm.weight.grad),
        (norm.bias.grad, escnn_norm.bias.grad),
        (norm.running_mean, escnn_norm.running_mean),
        (norm.running_var, escnn_norm.running_var),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
