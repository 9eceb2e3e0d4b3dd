"""Checkpoints of flopping-for-flops: a small file made by their modules, with their logits.

`flopping_d1convnext.safetensors` holds the state dict of their ConvNeXt of depths 1, 1, 2, 1 and dims 8, 16, 16, 32,
with random weights, and its `logits` [2, 5] for `image((2, 3, 64, 96))`.
"""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.reference_data import image

from equivision_timm.models.pretrained import WeightsError
from equivision_timm.testing import assert_equivariant
from equivision_timm.weights.convert import convert_file
from equivision_timm.weights.flopping import translate, translate_to

FILE = Path(__file__).parents[1] / "data" / "flopping_d1convnext.safetensors"
SHAPE = {"num_classes": 5, "depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32)}


def make():
    return timm.create_model("d1convnext_tiny", **SHAPE, mirror=True, group_pool="avg").eval()


def read():
    entries = load_file(FILE)
    return entries, entries.pop("logits")


@torch.no_grad()
def test_the_same_logits():
    entries, expected = read()
    model = make()
    model.load_state_dict(translate_to(model, entries))
    x = image((2, 3, 64, 96))
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1
    assert_equivariant(model, 64, 1e-5)
    model.set_grad_checkpointing()
    assert model.train()(x).isfinite().all()
    for one, other in (("sym_to_asym", "asym_to_sym"), ("sym_to_sym", "asym_to_asym")):  # the controls
        for layer in ("stages.2.1.dwconv", "downsample_layers.2.1"):
            a, b = (f"{layer}.{path}.weight" for path in (one, other))
            model.load_state_dict(translate_to(model, {**entries, a: entries[b], b: entries[a]}))
            assert (model.eval()(x) - expected).abs().max() > 1e-3


def test_entries_that_do_not_fit(tmp_path):
    entries, _ = read()
    with pytest.raises(WeightsError, match=r"stages\.0\.1"):
        translate(entries, "d1convnext_tiny")
    with pytest.raises(RuntimeError, match="more"):
        make().load_state_dict(translate_to(make(), {**entries, "more": torch.ones(1)}))
    with pytest.raises(WeightsError, match="NaN"):
        translate_to(make(), {**entries, "head.bias": entries["head.bias"] * float("nan")})
    save_file(entries, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        convert_file(tmp_path / "file.safetensors", "d1convnext_tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
