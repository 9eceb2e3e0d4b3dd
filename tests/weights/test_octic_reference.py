"""D4 ViTs with weights of octic-vits reproduce the figures of its modules, stage by stage."""

import pytest
import timm
import torch
from support import octic_data
from support.reference_data import image

from equivision_timm.layers.invariants import Invariants
from equivision_timm.weights.octic import translate_to

TOLERANCE = 2e-5
LARGE = {
    "deit_large_patch16": "d4vit_large_patch16_224",
    "dinov2_large_patch16": "d4vit_large_patch16_dinov2",
    "deit_huge_patch14": "d4vit_huge_patch14_224",
}


def run(model, x):
    """The stages of octic-vits, by name."""
    stages, as_theirs = {}, Invariants("", model.fields, "d4", 0)
    depth = model.equivariant_depth
    first, last, transition = model.blocks[0], model.blocks[depth - 1], model.blocks[depth].transition
    first.register_forward_pre_hook(lambda _, args: stages.update(embedded=as_theirs(args[0])))
    last.register_forward_hook(lambda _, args, y: stages.update(octic=as_theirs(y)))
    transition.register_forward_hook(lambda _, args, y: stages.update(handed_over=y))
    with torch.no_grad():
        stages["normed"] = model.forward_features(x)
        stages["output"] = model.forward_head(stages["normed"])
    return stages


def compare(model, case, size):
    expected = octic_data.figures(case)
    found = run(model, image((len(expected["output"]), 3, size, size)))
    assert found.keys() == expected.keys()
    for name, own in found.items():
        value = expected[name]
        if own.ndim == 3 and own.shape[1] != value.shape[1]:
            own = own[:, [0, 1, -1]]
        torch.testing.assert_close(own, value, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        assert value.std() > 0.01


@pytest.mark.parametrize(
    "case",
    [*octic_data.SMALL, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)],  # gigabytes
)
def test_every_stage(case):
    model = timm.create_model(LARGE[case]).eval() if case in LARGE else octic_data.small_model(case)
    model.load_state_dict(translate_to(model, octic_data.checkpoint(case)))
    compare(model, case, 224 if case in LARGE else 64)


@pytest.mark.parametrize("case", LARGE)
def test_large_models_have_their_parameters(case):
    with torch.device("meta"):
        model = timm.create_model(LARGE[case])
    own = sum(p.numel() for p in model.parameters())
    zeros = 7 * model.cls_token.numel()  # octic-vits stores them
    mask_token = 8 * model.cls_token.numel() if case.startswith("dinov2") else 0
    total = sum(torch.Size(shape).numel() for shape in octic_data.cases()[case]["shapes"].values())
    assert own + zeros + mask_token == total


@pytest.mark.parametrize("entry", ["norm1.weight", "attn.qkv.weight_plane", "attn.proj.weight_plane", "mlp.fc1.weight"])
def test_another_order_of_channels_gives_other_figures(entry):
    """The control: channels reversed in one entry of one block are found."""
    model = octic_data.small_model("deit_power")
    state = translate_to(model, octic_data.checkpoint("deit_power"))
    state[f"blocks.1.{entry}"] = state[f"blocks.1.{entry}"].flip(-1)
    model.load_state_dict(state)
    with pytest.raises(AssertionError, match="octic"):
        compare(model, "deit_power", 64)
