"""ReDet's ReResNet-50 against figures of its authors' own module, and files in their format."""

import json
import math
import zlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from support.reference_data import FOLDER, _draw, image

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.verify import verify
from equivision_timm.errors import InputError
from equivision_timm.models.equivariant_resnet import _averaged_classifier
from equivision_timm.testing import assert_equivariant, equivariance_error
from equivision_timm.weights.convert import convert_file
from equivision_timm.weights.redet import translate

TABLE = json.loads((FOLDER / "reresnet" / "reresnet50.json").read_text())
BASES = load_file(FOLDER / "reresnet" / "bases.safetensors")
NAME = "c8reresnet50"


@pytest.fixture(scope="module")
def checkpoint():
    """The file's entries, drawn as for the reference figures: names and shapes are enough."""
    state = {}
    for name, shape in TABLE["shapes"].items():
        if "sampled_basis" in name:
            key = {49: "c8/7x7/trivial", 9: "c8/3x3/regular", 1: "c8/1x1/regular"}[shape[-1]]
            state[name] = BASES[key].reshape(shape)
        elif name.endswith(".filter"):
            state[name] = torch.zeros(shape)
        elif "indices" in name:
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(".weights"):
            row = TABLE["conv"][name.removeprefix("backbone.").removesuffix(".weights")]
            rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), 0]))
            value = rng.standard_normal(shape).astype(np.float32)
            state[name] = torch.from_numpy(value / np.float32(math.sqrt(row["in_fields"] * row["basis"] / 8)))
        else:
            state[name] = torch.from_numpy(np.asarray(_draw(name, tuple(shape), 0)))
    return state


@pytest.fixture(scope="module")
def model(checkpoint):
    model = timm.create_model(NAME).eval()
    model.load_state_dict(translate(checkpoint, NAME).state_dict)
    return model


@pytest.mark.parametrize("size", [224, 225])
def test_the_reference(model, size):
    figures = np.load(FOLDER / "reresnet" / "reresnet50.npz")
    x = image((1, 3, size, size))
    with torch.no_grad():
        last, maps = model.forward_intermediates(x, [1, 2, 3, 4])
        logits = model.forward_head(last)
    for level, found in enumerate(maps, start=1):
        assert list(found.shape) == figures[f"{size}/layer{level}/shape"].tolist()
        expected = torch.from_numpy(figures[f"{size}/layer{level}/centre"])
        centre = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
        assert (centre - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    expected = torch.from_numpy(figures[f"{size}/logits"])
    assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_counts():
    with torch.device("meta"):
        backbone = timm.create_model(NAME, num_classes=0)
        counts = [sum(p.numel() for p in m.parameters()) for m in (backbone, timm.create_model("c8reresnet101"))]
    assert counts == [TABLE["parameters"], 7_064_856]


def test_the_published_classifier_is_not_invariant_and_its_mean_is(model):
    assert max(equivariance_error(model, 33).values()) > 1e-2
    averaged = timm.create_model(NAME, group_pool="avg").eval()
    averaged.load_state_dict(_averaged_classifier(model.state_dict(), averaged))
    assert_equivariant(averaged, 33)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(image((1, 3, 33, 33))), pre_logits=True)
        rolled = [features.unflatten(1, (-1, 8)).roll(k, 2).flatten(1) for k in range(8)]
        expected = torch.stack([model.fc(f) for f in rolled]).mean(0)
        torch.testing.assert_close(averaged(image((1, 3, 33, 33))), expected, rtol=1e-4, atol=1e-5)


def test_conversion_and_verification(checkpoint, model, tmp_path):
    file = tmp_path / "re_resnet50.pth"
    torch.save({"meta": {"epoch": 100, "time": "then"}, "state_dict": checkpoint}, file)
    assert "NOT invariant" in convert_file(file, NAME, tmp_path / "out")["classifier"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    pooled = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, group_pool="avg").eval()
    assert pooled.fc.in_features == 256
    assert_equivariant(pooled, 33)
    rows = {check.name: check for check in verify(str(tmp_path / "out"), tmp_path / "no photographs")}
    assert rows["equivariance"].ok
    assert "of the maps" in rows["equivariance"].finding
    with pytest.raises(InputError, match="--signs"):
        convert_file(file, NAME, tmp_path / "out", signs="haswell")


def test_a_detector(checkpoint, tmp_path):
    """Its backbone, without the classifier; what is around it is dropped, and said."""
    detector = {name: value for name, value in checkpoint.items() if name.startswith("backbone.")}
    detector["rpn_head.conv.weight"] = torch.zeros(2, 2)
    file = tmp_path / "redet.pth"
    torch.save({"state_dict": detector}, file)
    assert convert_file(file, NAME, tmp_path / "out")["dropped"] == "1 entries of the detector"
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True)
    assert [level.shape[1] for level in model(torch.zeros(1, 3, 33, 33))] == [64, 256, 512, 1024, 2048]


BASIS = "backbone.layer1.0.conv2._basisexpansion.block_expansion_('regular', 'regular').sampled_basis"


@pytest.mark.parametrize(
    ("name", "change", "noun"),
    [
        ("backbone.layer1.0.conv2.weights", None, "layer1.0.conv2.weights"),
        (BASIS, None, "sampled_basis"),
        ("backbone.bn1.batch_norm_[8].bias", None, "bn1"),
        (BASIS, lambda basis: basis + 0.1, "layer1.0.conv2"),
        (BASIS, lambda basis: basis[:48], "shape"),
        ("backbone.extra", lambda _: torch.zeros(1), "extra"),
        ("head.fc.bias", lambda bias: bias[:10], "fc.bias"),
    ],
)
def test_other_files_are_refused(checkpoint, name, change, noun):
    state = dict(checkpoint)
    value = state.pop(name, None)
    if change:
        state[name] = change(value)
    with torch.device("meta"):
        model = timm.create_model(NAME)
    with pytest.raises(RuntimeError, match=noun):
        model.load_state_dict(translate(state, NAME).state_dict, assign=True)
