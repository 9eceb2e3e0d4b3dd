"""The bridge to escnn, and our layers against escnn's: forward and gradient, for every frozen basis; and the
closed form against escnn's kernels where nothing is frozen."""

import importlib.util

import pytest
import torch
from support.cases import FROZEN, GROUPS
from support.escnn_kernels import sample_kernels
from support.reference_data import sign_patterns

from equivision_timm import escnn_interop
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis, manifest
from equivision_timm.kernels import Kernel
from equivision_timm.layers import ConvNormAct, GroupPool

HAS_ESCNN = importlib.util.find_spec("escnn") is not None
needs_escnn = pytest.mark.skipif(not HAS_ESCNN, reason="compares with escnn: pip install 'equivision-timm[escnn]'")


@pytest.mark.skipif(HAS_ESCNN, reason="escnn is installed; this is about the message without it")
@pytest.mark.parametrize("function", [escnn_interop.gspace, lambda group: sample_kernels(Kernel(group, 3))])
def test_message_without_escnn(function):
    with pytest.raises(ImportError, match=r"pip install 'equivision-timm\[escnn\]'.*gfortran"):
        function("c4")


def test_map_that_has_no_whole_fields():
    for shape in ((1, 9, 3, 3), (1, 8)):
        with pytest.raises(ValueError, match=r"does not consist of regular fields of c4: expected \[B, fields \* 4"):
            escnn_interop.to_geometric_tensor(torch.zeros(shape), "c4")


@needs_escnn
@pytest.mark.parametrize("group", GROUPS)
def test_geometric_tensor_has_our_transform(group):
    parsed = Group.from_name(group)
    features = torch.randn(2, 3 * parsed.order, 7, 7)
    tensor = escnn_interop.to_geometric_tensor(features, group)
    assert tensor.tensor is features
    space = escnn_interop.gspace(group)
    elements = list(space.testing_elements)
    assert len(elements) == parsed.order
    assert list(tensor.type.representations) == 3 * [space.regular_repr]
    for g in parsed.grid_elements:
        expected = parsed.transform_fields(features, g)
        torch.testing.assert_close(tensor.transform(elements[g]).tensor, expected, rtol=1e-4, atol=1e-5)


@needs_escnn
def test_our_feature_maps_as_geometric_tensors():
    import timm

    model = timm.create_model("d4resnet18_fast", features_only=True).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 33, 33))
    for features, fields in zip(maps, model.feature_info.get("num_fields"), strict=True):
        assert len(escnn_interop.to_geometric_tensor(features, "d4").type) == fields


@needs_escnn
@pytest.mark.parametrize("group", ["d4", "d1"])
def test_maps_of_vision_transformers_move_as_geometric_tensors(group):
    """For every element, the map of g x is the tensor of the map of x, moved by escnn; an escnn layer takes it.

    Field-major is what it says: the same channels element by element are no such tensor, nor are the ordinary blocks'.
    """
    import escnn.nn as enn
    import timm

    order = Group.from_name(group).order
    keywords = {"group": group, "img_size": 96, "embed_dim": 6 * order, "num_heads": 3, "depth": 3}
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
    conv, wrong_order, ordinary = None, [], []
    elements = escnn_interop.gspace(group).testing_elements
    for element, g in zip(elements, Group.from_name(group).grid_elements, strict=True):
        pairs = list(zip(maps(x), maps(Group.from_name(group).transform_image(x, g)), strict=True))
        for features, moved in pairs[:2]:
            tensor = escnn_interop.to_geometric_tensor(features, group)
            assert tensor.tensor is features
            assert len(tensor.type) == 6
            assert error(tensor, element, moved) < 1e-4
            conv = conv or enn.R2Conv(tensor.type, escnn_interop.field_type(group, 2), 3, padding=1)
            theirs = conv(escnn_interop.to_geometric_tensor(moved, group)).tensor
            assert error(conv(tensor), element, theirs) < 1e-4
            elementwise = [y.unflatten(1, (6, order)).transpose(1, 2).flatten(1, 2) for y in (features, moved)]
            wrong_order.append(error(escnn_interop.to_geometric_tensor(elementwise[0], group), element, elementwise[1]))
        features, moved = pairs[2]
        ordinary.append(error(escnn_interop.to_geometric_tensor(features, group), element, moved))
    assert max(wrong_order) > 0.1 < max(ordinary)


def machine_signs(group, size, input_type):
    """The sign of each basis element as this machine's escnn computes it, relative to the frozen one."""
    found = sample_kernels(Kernel(group, size, input_type))
    frozen = load_kernel_basis(Kernel(group, size, input_type))
    signs = torch.sign((found["kernels"] * frozen.sample()).flatten(1).sum(1)).float()
    kernels = found["kernels"] * signs.view(-1, 1, 1, 1, 1)
    return signs, (kernels - frozen.sample()).abs().max(), found


@needs_escnn
@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_sampled_kernels_are_the_frozen_ones_but_for_known_signs(group, size, input_type):
    key = f"{group}/{size}x{size}/{input_type}"
    signs, error, found = machine_signs(group, size, input_type)
    assert error < 1e-6
    assert found["elements"] == manifest()["elements"][key]
    assert (found["he_std"] - load_kernel_basis(Kernel(group, size, input_type)).he_std).abs().max() < 1e-6
    negated = torch.nonzero(signs < 0).flatten().tolist()
    known = [pattern.get(key, []) for pattern in sign_patterns()]
    assert negated in known or (size == 3 and input_type == "trivial")  # of these no pattern was recorded


@needs_escnn
@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("c4", 5),
        Kernel("c4", 7),
        Kernel("c4", 7, cutoff=3),
        Kernel("c4", 5, cutoff=2),
        Kernel("c8", 5),
        Kernel("d4", 5),
        Kernel("c6", 3),
        Kernel("c3", 5),
        Kernel("c16", 3),
        Kernel("c16", 7, "trivial", 3),
        Kernel("c6", 7, "trivial"),
        Kernel("d1", 7, cutoff=2),
        Kernel("d3", 3),
        Kernel("d6", 7, "trivial"),
        Kernel("d2", 5),
    ],
    ids=lambda kernel: kernel.name,
)
def test_closed_form_spans_the_kernels_of_escnn(kernel):
    found, group = sample_kernels(kernel), Group.from_name(kernel.group)
    basis = load_kernel_basis(kernel)
    assert found["rings"] == [vars(ring) for ring in kernel.rings]
    theirs, ours = found["kernels"].double(), basis.sample()
    assert theirs.shape == ours.shape
    flat = ours.flatten(1)
    assert (theirs.flatten(1) - theirs.flatten(1) @ flat.T @ flat).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(theirs.flatten(1), rtol=1e-4) == len(flat)
    fewer = flat[:-1]
    assert (theirs.flatten(1) - theirs.flatten(1) @ fewer.T @ fewer).abs().max() > 1e-3
    # and at initialisation each pair of irreps gets the same variance
    variances = []
    for kernels, std in ((theirs, found["he_std"].double()), (ours, basis.he_std)):
        q = group.fourier_matrix()
        in_irreps = torch.einsum("rg,bghyx->brhyx", q, kernels)
        if kernel.input_type == "regular":
            in_irreps = torch.einsum("sh,brhyx->brsyx", q, in_irreps)
        variances.append(torch.einsum("b,brs->rs", std**2, in_irreps.square().sum((3, 4))))
    sizes = [size * copies for size, copies in group.irreps()]
    inputs = sizes if kernel.input_type == "regular" else [1]
    for a, b in zip(*(v.split(sizes) for v in variances), strict=True):
        for c, d in zip(a.split(inputs, 1), b.split(inputs, 1), strict=True):
            torch.testing.assert_close(c.sum(), d.sum(), rtol=1e-4, atol=1e-6)


@needs_escnn
def test_escnn_has_no_low_pass():
    with pytest.raises(ValueError, match="no kernels with a low pass, as c4-5-regular-low: use low_pass=False"):
        sample_kernels(Kernel("c4", 5, low_pass=True))


@needs_escnn
@pytest.mark.parametrize(("group", "size", "input_type"), FROZEN)
def test_forward_and_gradient_equal_those_of_escnn(group, size, input_type):
    import escnn.nn as enn

    order, space = Group.from_name(group).order, escnn_interop.gspace(group)
    in_type = enn.FieldType(space, 3 * [space.trivial_repr if input_type == "trivial" else space.regular_repr])
    out_type = enn.FieldType(space, 2 * [space.regular_repr])
    conv = enn.R2Conv(in_type, out_type, size, padding=size // 2, stride=2, bias=False, initialize=False)
    theirs = enn.SequentialModule(conv, enn.InnerBatchNorm(out_type), enn.GroupPooling(out_type))
    ours = torch.nn.Sequential(ConvNormAct(3, 2, size, group, input_type, stride=2, act_layer=None), GroupPool(order))

    signs, _, _ = machine_signs(group, size, input_type)
    weight, norm = ours[0].conv.weight, ours[0].norm.per_field
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    their_norm = next(
        module for module in theirs.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    )
    their_norm.load_state_dict(norm.state_dict())
    with torch.no_grad():
        conv.weights.copy_((weight[..., 0] * signs).flatten())  # (o, i, b)

    x = torch.randn(4, in_type.size, 9, 9)
    mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours(mine), theirs(enn.GeometricTensor(reference, in_type)).tensor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1
    direction = torch.randn_like(expected)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad[..., 0].flatten(), conv.weights.grad * signs.repeat(6), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad, their_norm.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, their_norm.bias.grad, rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name), getattr(their_norm, name), rtol=1e-4, atol=1e-5)
