"""ViTs as timm's users run them: features, heads, sizes, distillation, export, wrong keywords."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from support.reference_data import image
from support.results import onnx_function
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from timm.utils import AttentionExtract

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.models.equivariant_vit import VARIANTS, checkpoint_filter_fn

FULL = {"equivariant_depth": 4}
PARAMETERS = {  # millions, with the published heads; counted by hand from the descriptions of the networks
    "d4vit_base_patch16_224": 49.22,
    "d4vit_base_patch16_full_224": 12.01,
    "d4hybridvit_large_patch16_224": 171.32,
    "d1vit_huge_patch14_224": 316.15,
}
X = image((2, 3, 64, 64))


def create(name="test_d4vit", **keywords):
    torch.manual_seed(0)
    return timm.create_model(name, **keywords).eval()


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def test_table():
    assert set(timm.list_models(module="equivariant_vit")) == set(VARIANTS)
    for name in VARIANTS:
        cfg = timm.get_pretrained_cfg(name)
        tag = ("dinov2_in1k" if "dinov2" in name else "deit3_in1k") if "d1" not in name and "ge_" in name else None
        classes = 0 if "dinov2" in name else 1000
        assert (cfg.tag, cfg.num_classes) == (("digits", 10) if name == "test_d4vit" else (tag, classes))
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(count, abs=0.06)
        assert model.patch_embed.patch_size[0] == (14 if "patch14" in name else 16)


@pytest.mark.parametrize("keywords", [{}, FULL], ids=str)
def test_intermediates(keywords):
    model = create(num_classes=7, reg_tokens=1, **keywords)
    last, maps = model.forward_intermediates(X)
    torch.testing.assert_close(last, model.forward_features(X))
    torch.testing.assert_close(model.forward_head(last), model(X))
    assert [m.shape for m in maps] == 4 * [(2, 48, 4, 4)]
    early, two = model.forward_intermediates(X, [0, 2], stop_early=True)
    torch.testing.assert_close(two, [maps[0], maps[2]])
    assert early.shape == last.shape == (2, 18, 48)
    ((patches, prefix),) = model.forward_intermediates(X, 1, True, output_fmt="NLC", intermediates_only=True)
    assert prefix.shape == (2, 2, 48)
    torch.testing.assert_close(patches.transpose(1, 2).reshape(2, 48, 4, 4), maps[-1])
    normed = model.forward_intermediates(X, [3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), last[:, 2:])
    if not keywords:
        with pytest.raises(ValueError, match="norm"):
            model.forward_intermediates(X, norm=True)


def test_features():
    model = create(features_only=True, out_indices=(0, 1, 3))
    info = model.feature_info
    assert (info.channels(), info.reduction()) == ([48, 48, 48], [16, 16, 16])
    assert (info.get("group"), info.get("num_fields")) == (["d4", "d4", "c1"], [6, 6, 48])
    torch.testing.assert_close(model(X), create().forward_intermediates(X, [0, 1, 3])[1])
    for other in ("hook", "fx"):  # would return the irreps basis
        with pytest.raises(ValueError, match="feature_cls"):
            create(features_only=True, feature_cls=other)


@pytest.mark.parametrize("keywords", [{}, FULL], ids=str)
def test_checkpoints_of_the_former_name_of_the_transition(keywords):
    model = create(**keywords)
    state = {name.replace("blocks.2.transition", "hand_over"): value for name, value in model.state_dict().items()}
    state = {name.replace("transition", "hand_over"): value for name, value in state.items()}
    assert len([name for name in state if name.startswith("hand_over.")]) == 2
    other = create(**keywords)
    other.init_weights()
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(state)
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)
    nn.Sequential(other).load_state_dict({f"0.{name}": value for name, value in state.items()})


@pytest.mark.parametrize(("depth", "index"), [(2, 1), (2, 3), (4, 1)])
def test_pruned_models_have_the_same_maps(depth, index):
    model = create(equivariant_depth=depth)
    expected = model.forward_intermediates(X, [index], intermediates_only=True)[0]
    model.prune_intermediate_layers([index], prune_norm=True)
    torch.testing.assert_close(model.forward_intermediates(X, [index], intermediates_only=True)[0], expected)
    model.forward_features(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_heads():
    model = create(num_classes=7)
    assert model(X).shape == (2, 7)
    assert model.get_classifier() is model.head
    model.reset_classifier(5, "avg")
    assert (model(X).shape, model.global_pool) == ((2, 5), "avg")
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "mean")
    assert model.num_classes == 5
    model.reset_classifier(0)
    assert model(X).shape == (2, 48)
    model.reset_classifier(0, "")
    assert model(X).shape == (2, 17, 48)
    mirrored = timm.create_model("d1vit_tiny_patch16_224", depth=2, equivariant_depth=2)
    assert (mirrored.num_features, mirrored.head_hidden_size) == (192, 96)


def test_parameters_without_weight_decay_and_layer_decay():
    model = create(distilled=True)
    names = dict(model.named_parameters())
    assert list(names)[-2:] == ["head_dist.weight", "head_dist.bias"]
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale = {name: found[id(p)]["lr_scale"] for name, p in names.items()}
    embedding = ("pos_embed", "cls_token", "dist_token", "patch_embed.proj.weight")
    assert {scale[name] for name in embedding} == {0.5**5}
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**i for i in (4, 3, 2, 1)]
    assert scale["blocks.2.transition.proj.weight"] == scale["blocks.2.norm1.weight"]
    assert scale["head.weight"] == scale["head_dist.weight"] == 1.0
    decayed = {name for name, p in names.items() if found[id(p)]["weight_decay"]}
    assert {name.split(".")[-1] for name in decayed} == {"weight", "weight_plane"}
    assert not any("norm" in name for name in decayed)


@pytest.mark.parametrize("kind", ["drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path"])
def test_dropouts_are_used(kind):
    for fused in (False, True):
        set_fused_attn(fused)
        model = create(num_classes=5, **{f"{kind}_rate": 0.9 if kind == "drop_path" else 0.5})
        torch.testing.assert_close(model(X), create(num_classes=5)(X))  # not in eval
        model.train()
        assert not torch.equal(model(X), model(X))
        assert model.forward_features(X).shape == (2, 9 if kind == "patch_drop" else 17, 48)


def test_attention_maps(unfused):
    """timm's AttentionExtract finds those of all blocks, and they are what the fused attention computes."""
    maps = AttentionExtract(create(**FULL), method="hook")(X)
    assert len(maps) == len(AttentionExtract(create(), method="hook")(X)) == 4
    assert len(AttentionExtract(create(), method="fx")(X)) == 4
    for attention in maps.values():
        assert attention.shape == (2, 3, 17, 17)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 17))
    set_fused_attn(True)
    fused = create(**FULL)
    assert not AttentionExtract(fused, method="hook").hooks.get_output("cpu")  # the control
    set_fused_attn(False)
    torch.testing.assert_close(create(**FULL)(X), fused(X), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keywords", [{}, FULL], ids=str)
def test_token_distillation_and_checkpointing(keywords):
    task = pytest.importorskip("timm.task")
    model = create(distilled=True, num_classes=10, drop_rate=0.1, **keywords)
    features = model.forward_features(X)
    torch.testing.assert_close(model(X), model.forward_head(features))
    teacher = timm.create_model("test_resnet", num_classes=10)
    step = task.TokenDistillationTask(model, teacher, nn.CrossEntropyLoss(), distill_type="hard", verbose=False).train()
    assert [logits.shape for logits in model(X)] == [(2, 10), (2, 10)]
    step(X, torch.tensor([1, 2]))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(X).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)
    assert model.forward_head(features, pre_logits=True).shape == (2, 48)
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    with pytest.raises(ValueError, match="distilled"):
        create().set_distilled_training()


def test_position_map_is_resized_on_load_and_by_set_input_size():
    small, x = create(), image((1, 3, 96, 96))
    dynamic = create(dynamic_img_size=True)
    dynamic.load_state_dict(small.state_dict())
    large = create(img_size=96)
    with pytest.raises(RuntimeError, match="pos_embed"):
        large.load_state_dict(small.state_dict())
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    torch.testing.assert_close(large(x), dynamic(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="5 x 5"):
        small.set_input_size(80)
    assert small(X).shape == (2, 10)  # unchanged
    small.set_input_size(96)
    torch.testing.assert_close(small(x), dynamic(x), atol=1e-5, rtol=1e-4)


def test_exact_sizes():
    model, rectangular = create(dynamic_img_size=True), create(group="d1", img_size=(64, 96))
    assert model.exact_sizes(near=100) == (96, 112)
    assert [model.is_exact(size) for size in (96, (48, 80), 100)] == [True, True, False]
    assert rectangular.exact_sizes() == (64, 96)
    assert [rectangular.is_exact(size) for size in ((64, 96), 64)] == [True, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace).* is (deprecated|not supported)")
@pytest.mark.parametrize(
    "keywords", [{}, FULL, {"invariants": "polynomial"}, {"group": "c4"}, {"group": "d1", "distilled": True}], ids=str
)
def test_graphs(keywords, unfused):
    """Traced by torch.jit without a warning about sizes that are checked."""
    model = create(**keywords)
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))
    set_fused_attn(True)
    model = create(**keywords)
    expected = model(X)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, X)(X), expected)
    if keywords in ({}, FULL):
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), expected)
        torch.testing.assert_close(copy.deepcopy(model)(X), expected)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)


def test_exported_for_all_batch_and_image_sizes():
    model, x = create(dynamic_img_size=True), image((2, 3, 96, 64))
    patches = [torch.export.Dim(name, min=2, max=16) for name in ("rows", "columns")]
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: 16 * patches[0], 3: 16 * patches[1]}
    program = torch.export.export(model, (x,), dynamic_shapes=[sizes]).module()
    for shape in ((2, 3, 96, 64), (3, 3, 128, 80)):
        torch.testing.assert_close(program(image(shape)), model(image(shape)), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Constant folding")
@pytest.mark.parametrize(("keywords", "opset"), [({}, None), ({"group": "c4", **FULL}, 17)], ids=str)
def test_onnx(keywords, opset, tmp_path):
    """By the exporter of torch.export, and by that of TorchScript with its opsets."""
    if opset is None and Version(torch.__version__) < Version("2.9"):
        pytest.skip("its exporter cannot write this graph")
    model = create(**keywords)
    exported = onnx_function(tmp_path, model, X, dynamo=opset is None, opset_version=opset)
    torch.testing.assert_close(exported(X), model(X), atol=1e-5, rtol=1e-4)


WRONG = [
    ({"group": "c8"}, "c8"),
    ({"embed_dim": 52}, "embed_dim 52"),
    ({"num_heads": 4}, "num_heads 4"),
    ({"equivariant_depth": 5}, "equivariant_depth 5"),
    ({"invariants": "linear"}, "linear"),
    ({"invariants": "trivial"}, "trivial"),
    ({"invariants": "polynomial", "group": "c4"}, "polynomial"),
    ({"invariants": "", "equivariant_depth": 4}, "invariants"),
    ({"img_size": 80}, "5 x 5"),
    ({"img_size": 70}, "70 x 70"),
    ({"patch_size": 15, "img_size": 60}, "15 x 15"),
    ({"global_pool": "map"}, "global_pool"),
    ({"class_token": False}, "global_pool"),
    ({"distilled": True, "global_pool": "avg"}, "global_pool"),
    ({"act_layer": nn.GLU}, "pointwise"),
]


def test_wrong_keywords_and_images():
    for keywords, word in WRONG:
        with pytest.raises(ValueError, match=word):
            create(**keywords)
    for shape, dynamic, word in (((1, 3, 64, 80), False, "dynamic_img_size"), ((1, 3, 70, 64), True, "patch")):
        with pytest.raises(AssertionError, match=word):
            create(dynamic_img_size=dynamic)(torch.zeros(shape))
