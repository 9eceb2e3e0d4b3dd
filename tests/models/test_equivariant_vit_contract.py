"""What timm's users do with a ViT: features, heads, other sizes, layer decay, export, wrong keywords."""

import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from packaging.version import Version
from support.reference_data import image
from timm.optim import create_optimizer_v2

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.groups import Group
from equivision_timm.models.equivariant_vit import VARIANTS, EquivariantViT, checkpoint_filter_fn

NAMES = [
    *(f"d4vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    "d4vit_huge_patch14_224",
    "d4vit_large_patch16_dinov2",
    "d4vit_huge_patch16_dinov2",
    "d4vit_small_patch16_full_224",
    "d4vit_base_patch16_full_224",
    "d4hybridvit_large_patch16_224",
    "d4hybridvit_huge_patch14_224",
    "d4hybridvit_large_patch16_dinov2",
    "d4hybridvit_huge_patch16_dinov2",
    *(f"d1vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    "d1vit_huge_patch14_224",
    "test_d4vit",
]
PARAMETERS = {  # millions, with the published heads; counted by hand from the descriptions of the networks
    "d4vit_tiny_patch16_224": 3.26,
    "d4vit_base_patch16_224": 49.22,
    "d4vit_large_patch16_224": 175.52,
    "d4vit_huge_patch14_224": 362.33,
    "d4vit_huge_patch16_dinov2": 355.76,
    "d4vit_base_patch16_full_224": 12.01,
    "d4hybridvit_large_patch16_224": 171.32,
    "d1vit_base_patch16_224": 43.3,
    "d1vit_huge_patch14_224": 316.15,
}


def create(**keywords):
    torch.manual_seed(0)
    return timm.create_model("test_d4vit", **keywords).eval()


def test_all_names_are_listed():
    assert sorted(timm.list_models(module="equivariant_vit")) == sorted(NAMES) == sorted(VARIANTS)
    assert not set(NAMES) & set(timm.list_models(module="vision_transformer"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.06)
    assert model.patch_embed.patch_size[0] == (14 if "patch14" in name else 16)


@pytest.mark.parametrize("name", NAMES)
def test_cfgs(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.first_conv == "patch_embed.proj"
    assert cfg.classifier == "head"
    assert cfg.crop_pct == 1.0
    assert cfg.hf_hub_id is None  # nothing is published: no host is asked
    published = name.startswith(("d4vit_", "d4hybridvit_")) and ("large" in name or "huge" in name)
    dinov2 = "dinov2" in name
    if name == "test_d4vit":
        assert (cfg.tag, cfg.num_classes) == ("digits", 10)
    else:
        assert cfg.tag == (("dinov2_in1k" if dinov2 else "deit3_in1k") if published else None)
        assert cfg.num_classes == (0 if dinov2 else 1000)


@pytest.mark.parametrize("full", [False, True])
def test_intermediates(full):
    model, x = create(num_classes=7, reg_tokens=1, equivariant_depth=4 if full else 2), image((2, 3, 64, 64))
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
        torch.testing.assert_close(model.forward_head(last), model(x))
        assert [m.shape for m in maps] == 4 * [(2, 48, 4, 4)]
        early, two = model.forward_intermediates(x, [0, 2], stop_early=True)
        torch.testing.assert_close(two, [maps[0], maps[2]])
        assert early.shape == last.shape == (2, 18, 48)
        tokens = model.forward_intermediates(x, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
        ((patches, prefix),) = tokens
        assert patches.shape == (2, 16, 48)
        assert prefix.shape == (2, 2, 48)
        torch.testing.assert_close(patches.transpose(1, 2).reshape(2, 48, 4, 4), maps[-1])
        normed = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(normed.flatten(2).transpose(1, 2), last[:, 2:])
        torch.testing.assert_close(model.get_intermediate_layers(x, [3], reshape=True, norm=True)[0], normed)


def test_feature_info_names_fields_and_group():
    model = create(features_only=True, out_indices=(0, 1, 3))
    assert model.feature_info.channels() == [48, 48, 48]
    assert model.feature_info.reduction() == [16, 16, 16]
    assert model.feature_info.get("group") == ["d4", "d4", "c1"]
    assert model.feature_info.get("num_fields") == [6, 6, 48]
    maps, whole = model(image((1, 3, 64, 64))), create()
    torch.testing.assert_close(maps, whole.forward_intermediates(image((1, 3, 64, 64)), [0, 1, 3])[1])
    assert len(create(features_only=True)(image((1, 3, 64, 64)))) == 3


def test_pruned_models_keep_their_maps():
    x = image((1, 3, 64, 64))
    for depth in (2, 4):
        for index in range(4):
            model = create(equivariant_depth=depth)
            expected = model.forward_intermediates(x, [index], intermediates_only=True)[0]
            model.prune_intermediate_layers([index], prune_norm=True)
            torch.testing.assert_close(model.forward_intermediates(x, [index], intermediates_only=True)[0], expected)
            model.forward_features(x).sum().backward()
            assert all(p.grad is not None for p in model.parameters())


def test_heads():
    model, x = create(num_classes=7), image((2, 3, 64, 64))
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.head
    model.reset_classifier(5, "avg")
    assert (model(x).shape, model.global_pool) == ((2, 5), "avg")
    model.reset_classifier(0)
    assert model(x).shape == (2, 48)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 17, 48)
    mirrored = timm.create_model("d1vit_tiny_patch16_224", depth=2, equivariant_depth=2)
    assert (mirrored.num_features, mirrored.head_hidden_size) == (192, 96)


def test_parameters_without_weight_decay_and_layer_decay():
    model = create()
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= {*names, "reg_token"}
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scale = {name: found[id(p)]["lr_scale"] for name, p in names.items()}
    assert scale["pos_embed"] == scale["cls_token"] == scale["patch_embed.proj.weight"] == 0.5**5
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**i for i in (4, 3, 2, 1)]
    assert scale["hand_over.proj.weight"] == scale["blocks.2.norm1.weight"]
    assert scale["head.weight"] == 1.0
    decayed = {name for name, p in names.items() if found[id(p)]["weight_decay"]}
    assert {name.split(".")[-1] for name in decayed} == {"weight", "weight_plane"}
    assert not any("norm" in name or "gamma" in name or "bias" in name for name in decayed)


@pytest.mark.parametrize("depth", [2, 4])
def test_checkpointing_gives_the_same_gradients(depth):
    x, gradients = image((2, 3, 64, 64)), []
    for enable in (False, True):
        model = create(num_classes=3, equivariant_depth=depth).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_dropouts_are_used():
    rates = {"drop_rate": 0.5, "pos_drop_rate": 0.5, "patch_drop_rate": 0.5, "proj_drop_rate": 0.5}
    x = image((2, 3, 64, 64))
    for name, rate in {**rates, "attn_drop_rate": 0.5, "drop_path_rate": 0.9}.items():
        model = create(num_classes=5, **{name: rate})
        torch.testing.assert_close(model(x), create(num_classes=5)(x))  # not in eval
        model.train()
        assert not torch.equal(model(x), model(x)), name
    model = create(patch_drop_rate=0.5).train()
    assert model.forward_features(x).shape == (2, 9, 48)
    assert [type(block.drop_path1) for block in create(drop_path_rate=0.1).blocks] == 4 * [timm.layers.DropPath]


def test_fix_init_scales_the_last_weights_of_each_block():
    model = create(fix_init=True)
    for number, block in enumerate(model.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)


def test_grey_images():
    grey = create(in_chans=1)
    colour = create()
    weight = colour.patch_embed.proj.weight
    assert grey.patch_embed.proj.weight.shape == (weight.shape[0], 1, *weight.shape[2:])
    state = {**colour.state_dict(), "patch_embed.proj.weight": weight.sum(1, keepdim=True)}
    grey.load_state_dict(state)
    x = image((1, 1, 64, 64))
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


def test_position_map_is_resized_on_load_and_by_set_input_size():
    small, x = create(), image((1, 3, 96, 96))
    dynamic = create(dynamic_img_size=True)
    dynamic.load_state_dict(small.state_dict())
    large = create(img_size=96)
    with pytest.raises(RuntimeError, match="pos_embed"):
        large.load_state_dict(small.state_dict())
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    torch.testing.assert_close(large(x), dynamic(x), atol=1e-5, rtol=1e-4)
    small.set_input_size(96)
    torch.testing.assert_close(small(x), dynamic(x), atol=1e-5, rtol=1e-4)
    assert small.pos_embed.shape == (6, 6, 3, 3)
    state = create().state_dict()
    assert checkpoint_filter_fn(state, create()) is state


def test_meta_device_and_types():
    with torch.device("meta"):
        model = timm.create_model("test_d4vit")
    assert all(value.is_meta for value in model.state_dict().values())
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert model.eval()(image((1, 3, 64, 64))).isfinite().all()
    half = create().bfloat16()
    assert half(image((1, 3, 64, 64)).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = create()(image((1, 3, 64, 64)))
    torch.testing.assert_close(mixed.float(), create()(image((1, 3, 64, 64))), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("keywords", [{}, {"equivariant_depth": 4}, {"invariants": "polynomial"}], ids=str)
def test_graphs(keywords):
    model, x = create(**keywords), image((2, 3, 64, 64))
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace).* is (deprecated|not supported)")
@pytest.mark.parametrize("keywords", [{}, {"invariants": "polynomial"}, {"group": "c4"}, {"group": "d1"}], ids=str)
def test_torchscript(keywords):
    """Scripted; and traced, without a warning of sizes that are checked."""
    model, x = create(**keywords), image((2, 3, 64, 64))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_exported_for_all_batch_and_image_sizes():
    model, x = create(dynamic_img_size=True), image((2, 3, 96, 64))
    patches = [torch.export.Dim(name, min=2, max=16) for name in ("rows", "columns")]
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: 16 * patches[0], 3: 16 * patches[1]}
    program = torch.export.export(model, (x,), dynamic_shapes=[sizes]).module()
    for shape in ((2, 3, 96, 64), (3, 3, 128, 80)):
        torch.testing.assert_close(program(image(shape)), model(image(shape)), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write this graph")
def test_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, file = create(), image((2, 3, 64, 64)), io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"group": "c8"}, "c8"),
        ({"group": "e4"}, "e4"),
        ({"embed_dim": 52}, "embed_dim 52"),
        ({"num_heads": 4}, "num_heads 4"),
        ({"equivariant_depth": 5}, "equivariant_depth 5"),
        ({"equivariant_depth": 0}, "equivariant_depth 0"),
        ({"invariants": "linear"}, "linear"),
        ({"invariants": "trivial"}, "trivial"),
        ({"invariants": "polynomial", "group": "c4"}, "polynomial"),
        ({"invariants": "", "equivariant_depth": 4}, "hybrid"),
        ({"img_size": 80}, "80 x 80.*img_size=64"),
        ({"img_size": (64, 96)}, "64 x 96.*img_size=96"),
        ({"img_size": 70}, "70 x 70.*64 x 64"),
        ({"img_size": 8}, "8 x 8.*16 x 16"),
        ({"patch_size": 15, "img_size": 60}, "15 x 15"),
        ({"global_pool": "map"}, "global_pool"),
        ({"class_token": False}, "class_token"),
        ({"act_layer": nn.GLU}, "pointwise"),
    ],
)
def test_keyword_of_the_wrong_value(keywords, word):
    with pytest.raises(ValueError, match=word):
        create(**keywords)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="dynamic_img_pad"):
        create(dynamic_img_pad=True)


@pytest.mark.parametrize(
    ("shape", "dynamic", "word"),
    [
        ((1, 3, 64, 80), False, "dynamic_img_size"),
        ((1, 3, 70, 64), True, "patch"),
        ((1, 1, 64, 64), False, "in_chans=1"),
        ((3, 64, 64), False, "batch"),
    ],
)
def test_image_that_does_not_fit(shape, dynamic, word):
    with pytest.raises(AssertionError, match=word):
        create(dynamic_img_size=dynamic)(torch.zeros(shape))


def test_refused_calls_change_nothing():
    model = create(num_classes=7)
    with pytest.raises(ValueError, match="img_size 80 x 80"):
        model.set_input_size(80)
    with pytest.raises(ValueError, match="patch_size 8 is not that of this model, 16"):
        model.set_input_size(64, 8)
    with pytest.raises(ValueError, match="unknown global_pool 'mean'"):
        model.reset_classifier(3, "mean")
    assert (model.num_classes, model.patch_embed.img_size) == (7, (64, 64))
    assert model(image((1, 3, 64, 64))).shape == (1, 7)


def test_refused_intermediates():
    x = image((1, 3, 64, 64))
    with pytest.raises(ValueError, match="output_fmt 'NHWC' does not exist for this model: use 'NCHW' or 'NLC'"):
        create().forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"norm=True is for blocks 2 to 3.*but block 0 is equivariant"):
        create().forward_intermediates(x, norm=True)
    with pytest.raises(ValueError, match=r"patch_drop_rate 0.5 leaves no whole map in training"):
        create(patch_drop_rate=0.5).train().forward_intermediates(x)


def test_no_weights_exist():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for d4vit_tiny_patch16_224"):
        timm.create_model("d4vit_tiny_patch16_224", pretrained=True)


def test_geometric_tensors_take_the_maps():
    pytest.importorskip("escnn")
    from equivision_timm.escnn_interop import to_geometric_tensor

    x = image((1, 3, 64, 64))
    first, moved = (
        create().forward_intermediates(Group.from_name("d4").transform_image(x, g), [1])[1][0] for g in (0, 1)
    )
    tensor = to_geometric_tensor(first.detach(), "d4")
    rotated = tensor.transform(
        next(g for g in tensor.type.testing_elements if g == tensor.type.fibergroup.element((0, 1)))
    )
    torch.testing.assert_close(rotated.tensor, moved, atol=1e-4, rtol=1e-4)
    assert isinstance(create(), EquivariantViT)
