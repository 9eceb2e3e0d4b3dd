"""ConvNeXts: exact for every element of the group, equal to timm's with the dense weights; and what must fail."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from support.reference_data import image
from support.results import onnx_function
from timm.layers.grn import GlobalResponseNorm
from timm.optim import create_optimizer_v2
from timm.utils.model import reparameterize_model

from equivision_timm import fuse
from equivision_timm.groups import Group
from equivision_timm.layers.field_mlp import CHUNK, FieldGRN, FieldLayerNorm, FieldMlp
from equivision_timm.layers.grid_conv import DepthwiseConv2d, PatchConv2d
from equivision_timm.layers.tokens import IrrepLinear
from equivision_timm.models.equivariant_convnext import VARIANTS
from equivision_timm.testing import assert_equivariant, equivariance_error

GROUPS = ["d4", "c4", "d1", "d2", "c2", "c1"]
SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 128, 160), "num_classes": 10}
KINDS = {
    "d4": {},
    "d4v2": {"use_grn": True, "ls_init_value": None, "kernel_sizes": (3, 5, 7, 9), "act_layer": "silu"},
    "c4": {"group": "c4", "group_pool": "avg", "global_pool": "max"},
    "d1": {"group": "d1", "conv_bias": False},
    "d2": {"group": "d2"},
}
X = image((2, 3, 64, 64))


def create(name="d4convnext_atto", **keywords):
    """A small network in which every parameter matters, none at its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **keywords})
    for parameter in model.parameters():
        noise = 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data + noise if parameter.ndim > 1 else 0.5 + noise
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_logits(kind):
    model, x = create(**KINDS[kind]), image((2, 3, 96, 64))
    assert max(equivariance_error(model, 64).values()) < 1e-5
    model, x, group = model.double(), x.double(), Group.from_name(model.group)
    last, maps = model.forward_intermediates(x)
    logits = model.forward_head(last)
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits.abs().max()
    for g in group.grid_elements:
        moved, found = model.forward_intermediates(group.transform_image(x, g))
        for actual, plain in zip(found, maps, strict=True):
            torch.testing.assert_close(actual, group.transform_fields(plain, g), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(model.forward_head(moved), logits, atol=1e-11, rtol=1e-11)


def test_sizes_and_symmetries_that_the_group_lacks():
    assert_equivariant(timm.create_model("d4convnext_tiny", num_classes=10), 224, 2e-5)
    model = create()
    assert [model.is_exact(size) for size in (224, (96, 64), 225, 80)] == [True, True, False, False]
    assert model.exact_sizes(near=230) == (224, 256)
    with pytest.raises(AssertionError):
        assert_equivariant(model, 80)
    assert min(equivariance_error(create(group="c4"), 64, "d4")[g] for g in range(4, 8)) > 1e-3
    assert equivariance_error(create(group="d1"), 64, "c2")[1] > 1e-3
    with pytest.raises(AssertionError):
        assert_equivariant(create(group_pool=""), 64)


@pytest.mark.parametrize("place", ["stem.0", "stages.0.blocks.0.conv_dw", "stages.1.downsample.1"])
def test_a_broken_layer_is_found(place):
    """The control: the same weights in a filter that does not follow the group."""
    model = create()
    layer = model.get_submodule(place)
    values = torch.randn_like(layer.filter())
    layer.filter = lambda: values
    with pytest.raises(AssertionError):
        assert_equivariant(model, 64)


@pytest.mark.parametrize("group", GROUPS)
def test_filters_are_those_of_the_definition(group):
    """K[(o, g), (i, h)] = g . w[o, i, g^-1 h], entry by entry."""
    parsed = Group.from_name(group)
    order, inverse = parsed.order, parsed.left_quotients()
    lift = PatchConv2d(3, 2, 4, group, regular=False)
    regular = PatchConv2d(3 * order, 2, 2, group, regular=True)
    depthwise = DepthwiseConv2d(2, 7, group)
    w = regular.weight.unflatten(1, (3, order))
    for g in range(order):
        moved = parsed.transform_image(lift.weight, g)
        assert torch.equal(lift.filter().unflatten(0, (2, order))[:, g], moved)
        moved = parsed.transform_image(depthwise.weight, g)
        assert torch.equal(depthwise.filter().unflatten(0, (2, order))[:, g], moved)
        for h in range(order):
            entry = regular.filter().unflatten(1, (3, order)).unflatten(0, (2, order))[:, g, :, h]
            assert torch.equal(entry, parsed.transform_image(w[:, :, inverse[g, h]], g))


@pytest.mark.parametrize("use_grn", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_mlp_commutes_and_is_the_same_in_all_its_forms(group, use_grn):
    order, x = Group.from_name(group).order, torch.randn(2, 40, 16, 4 * Group.from_name(group).order)
    mlp = FieldMlp(4, 8, group, use_grn=use_grn)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    dense = mlp(x)
    mlp.narrow = False
    torch.testing.assert_close(mlp(x), dense, atol=1e-4, rtol=1e-4)  # block diagonal
    assert x[..., 0].numel() > CHUNK
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), dense, atol=1e-4, rtol=1e-4)  # chunk by chunk
    for g in range(order):
        quotients = Group.from_name(group).left_quotients()[g]
        moved, expected = (t.unflatten(-1, (-1, order))[..., quotients].flatten(-2) for t in (x, dense))
        torch.testing.assert_close(mlp(moved), expected, atol=1e-4, rtol=1e-4)


def test_grn_of_the_trivial_group_is_timms():
    x, ours, plain = torch.randn(2, 5, 6, 8), FieldGRN(8, 1), GlobalResponseNorm(8)
    for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data = parameter.data
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.on_elements(x[None])[0], plain(x))


@torch.no_grad()
@pytest.mark.parametrize("group", ["d4", "c4", "d1"])
def test_is_timms_network_with_dense_weights(group):
    model, order = create(group=group), Group.from_name(group).order
    plain = timm.create_model("convnext_atto", **SMALL, conv_mlp=False).eval()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, PatchConv2d | DepthwiseConv2d):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = module.filter(), module.field_bias()
        elif isinstance(module, IrrepLinear):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = module.dense()
        elif not name.startswith("head"):
            parameters = module.named_parameters(name, recurse=False)
            weights |= {path: value.repeat_interleave(order) for path, value in parameters}
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    torch.testing.assert_close(model.forward_features(X), plain.forward_features(X), atol=1e-4, rtol=1e-4)


def test_table():
    assert set(timm.list_models(module="equivariant_convnext")) == set(VARIANTS)
    for name in VARIANTS.keys() - {"test_d4convnext"}:
        with torch.device("meta"):
            plain = timm.create_model(name[2:])
        arguments = VARIANTS[name].arguments
        assert [level["num_chs"] for level in plain.feature_info] == list(arguments["dims"])
        assert [len(stage.blocks) for stage in plain.stages] == list(arguments["depths"])
        assert arguments["group"] == name[:2]
    with torch.device("meta"):
        count = sum(p.numel() for p in timm.create_model("d4convnext_tiny", num_classes=0).parameters())
    assert count == pytest.approx(28e6 / 8, rel=0.05)


def test_features_and_heads():
    model = create(features_only=True, out_indices=(0, 2))
    assert (model.feature_info.channels(), model.feature_info.get("num_fields")) == ([16, 128], [2, 16])
    whole = create()
    assert (whole.num_features, whole.head_hidden_size) == (160, 20)
    torch.testing.assert_close(model(X), whole.forward_intermediates(X, [0, 2], stop_early=True)[1])
    torch.testing.assert_close(whole.stages[0](whole.stem(X)), model(X)[0])  # the module that feature_info names
    whole.reset_classifier(0, "")
    assert whole(X).shape == (2, 20, 2, 2)
    with pytest.raises(ValueError, match="global_pool"):
        whole.reset_classifier(5, "")
    whole.reset_classifier(5, "avg")
    assert (whole(X).shape, whole.get_classifier().out_features) == ((2, 5), 5)
    whole, pooled = create(num_classes=0), create(num_classes=0, map_pool="max")
    pooled.load_state_dict(whole.state_dict())
    expected = whole.forward_features(X).unflatten(1, (20, 8)).amax(2)
    torch.testing.assert_close(pooled.forward_features(X), expected, atol=1e-5, rtol=1e-4)


def test_layer_decay_and_checkpointing():
    model = create()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(model.stem[0].weight)] < scales[id(model.stages[3].blocks[0].mlp.fc1.weight)] < 1
    assert scales[id(model.head.fc.weight)] == 1
    gradients = []
    for enable in (False, True):
        other = copy.deepcopy(model).train()
        other.set_grad_checkpointing(enable)
        other(X).square().sum().backward()
        gradients.append([p.grad for p in other.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace).* is (deprecated|not supported)")
@pytest.mark.parametrize(("kind", "grad"), [("d4v2", True), ("d4", False)])
def test_graphs(kind, grad):
    model = create(**KINDS[kind], depths=(1, 1), dims=(16, 128))
    with torch.set_grad_enabled(grad):
        expected = model(X)
        graphs = [torch.fx.symbolic_trace(model), torch.export.export(model, (X,)).module()]
        graphs += [torch.compile(model, backend="eager", fullgraph=True)]
        graphs += [torch.jit.script(model), torch.jit.trace(model, X)]
        for graph in graphs:
            torch.testing.assert_close(graph(X), expected, atol=1e-4, rtol=1e-4)


def test_memory_of_training():
    """Bytes that autograd stores, without the parameters, as a multiple of those of timm's network."""
    stored = []
    for name in ("d4convnext_tiny", "convnext_tiny"):
        model = timm.create_model(name)
        own, sizes, tensors = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

        def store(tensor, own=own, sizes=sizes, tensors=tensors):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                tensors.append(tensor)  # so that no other storage gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            model(image((1, 3, 224, 224)))
        stored.append(sum(sizes.values()))
    assert stored[0] < 1.1 * stored[1]


def test_refused_keywords():
    for word, keywords in {
        "c8": {"group": "c8"},
        "dims": {"dims": (16, 32, 50, 64)},
        "map_pool": {"map_pool": "max"},
        "global_pool": {"global_pool": ""},
        "kernel_size": {"kernel_sizes": 4},
        "pointwise": {"act_layer": nn.GLU},
        "mirror": {"mirror": True},
    }.items():
        with pytest.raises(ValueError, match=word):
            create(**keywords)


FORMS = pytest.mark.parametrize("form", ["native", "blocks", "dense"])


class Changed(nn.Sequential):
    def forward(self, x):
        return -99 * super().forward(x)


@torch.no_grad()
@FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_fused_is_the_model(kind, form):
    model, x = create(drop_path_rate=0.5, **KINDS[kind]), image((2, 3, 96, 64))
    before = copy.deepcopy(model.state_dict())
    fused = copy.deepcopy(fuse(fuse(model, form), form))
    for part in (x, X):
        torch.testing.assert_close(fused(part), model(part), atol=1e-5, rtol=1e-5)
    for found, expected in zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert fused(X[:0]).shape == (0, 10)
    assert not any(isinstance(m, PatchConv2d | DepthwiseConv2d | FieldLayerNorm) for m in fused.modules())
    assert (form == "native") == any(isinstance(m, FieldMlp) for m in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    convs = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    for conv in (convs[0], convs[-1]):  # the controls
        conv.weight[0] += 0.1
        assert (fused(x) - model(x)).abs().max() > 1e-3


@torch.no_grad()
@FORMS
def test_fused_in_other_types_and_changed_by_hand(form):
    model = create(**KINDS["d4v2"])
    exact = copy.deepcopy(model).double()
    torch.testing.assert_close(fuse(exact, form)(X.double()), exact(X.double()), atol=1e-12, rtol=1e-12)
    assert fuse(copy.deepcopy(model).bfloat16(), form)(X.bfloat16()).dtype == torch.bfloat16
    before = model(X)
    for path in ("stages.1.downsample.1", "stages.2.blocks.1.conv_dw", "stages.0.blocks.0.mlp.fc2"):
        hooked, replaced = copy.deepcopy(model), copy.deepcopy(model)
        hooked.get_submodule(path).register_forward_hook(lambda module, args, output: -99 * output)
        replaced.set_submodule(path, Changed(model.get_submodule(path)))
        expected = hooked(X)
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(replaced(X), expected)
        for changed in (hooked, replaced):
            torch.testing.assert_close(fuse(changed, form)(X), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write these graphs")
@torch.no_grad()
def test_blocks_in_onnxruntime(tmp_path):
    model = create(depths=(1, 1), dims=(16, 32), kernel_sizes=3)
    fused = reparameterize_model(model)
    assert [type(m) for m in fused.modules()] == [type(m) for m in fuse(model, "blocks").modules()]
    exported = onnx_function(tmp_path, fused, X, dynamo=True)
    torch.testing.assert_close(exported(X), model(X), atol=1e-4, rtol=1e-4)
