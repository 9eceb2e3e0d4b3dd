"""Files of octic-vits: every wrapper they may come in, and everything that is no such file, or another model's."""

import argparse
import json
import zipfile

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import octic_data

from equivision_timm.models.equivariant_vit import VARIANTS, Variant
from equivision_timm.models.pretrained import local_folder
from equivision_timm.weights.fetch import fetch
from equivision_timm.weights.octic import translate as translate_module
from equivision_timm.weights.octic.convert_file import convert_file
from equivision_timm.weights.octic.read_file import read_octic
from equivision_timm.weights.octic.translate import fitting_models, invariants_of, translate, translate_to
from equivision_timm.weights.read_file import read_checkpoint
from equivision_timm.weights.released import released_in

SIZE = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_heads": 2}
TABLE = {  # the published models at the size of the small reference cases
    "d4vit_large_patch16_224": ("deit_polynomial", "deit3_in1k", {"invariants": "polynomial", "num_classes": 10}),
    "d4vit_large_patch16_dinov2": ("dinov2_power", "dinov2_in1k", {"num_classes": 0}),
    "d4hybridvit_large_patch16_224": ("deit_hybrid", "deit3_in1k", {"invariants": "", "num_classes": 10}),
    "d4hybridvit_large_patch16_dinov2": ("dinov2_hybrid", "dinov2_in1k", {"invariants": "", "num_classes": 0}),
}


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    """The variants of octic-vits, small: their names and kinds are the published ones."""
    for name in [name for name, variant in VARIANTS.items() if variant.tag in translate_module.TAGS]:
        if name in TABLE:
            _, tag, keywords = TABLE[name]
            monkeypatch.setitem(VARIANTS, name, Variant("", {**SIZE, **keywords}, {}, tag))
        else:
            monkeypatch.delitem(VARIANTS, name)
    for name in TABLE:
        monkeypatch.setitem(timm.get_pretrained_cfg(name).__dict__, "fixed_input_size", False)


def theirs(name):
    return octic_data.checkpoint(TABLE[name][0])


def save(folder, content, file="checkpoint.pth"):
    torch.save(content, folder / file)
    return folder / file


def wrappers(state):
    """As a training script of DeiT III or DINOv2, a compiler, data parallelism or nobody wraps a network."""
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.last_layer.weight_v": torch.ones(2, 2)}
    options = argparse.Namespace(model="hybrid", lr=3e-3, epochs=400, output_dir="")
    return {
        "bare": state,
        "deit": {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 399, "args": options},
        "compiled": {"model": {f"_orig_mod.{name}": value for name, value in state.items()}, "scaler": {}},
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "dinov2": {"teacher": {**{f"backbone.{name}": value for name, value in state.items()}, **heads}},
        "dinov2_compiled": {"teacher": {**{f"backbone._orig_mod.{n}": v for n, v in state.items()}, **heads}},
    }


@pytest.mark.parametrize("wrapper", ["bare", "deit", "compiled", "parallel", "dinov2", "dinov2_compiled"])
def test_wrappers_are_stripped(tmp_path, wrapper):
    state = theirs("d4vit_large_patch16_dinov2")
    file = read_octic(save(tmp_path, wrappers(state)[wrapper]))
    assert file.tensors.keys() == state.keys()
    assert all(torch.equal(file.tensors[name], value) for name, value in state.items())
    assert len(file.dropped) == (2 if wrapper.startswith("dinov2") else 0)


@pytest.mark.parametrize("name", TABLE)
def test_converted_folders_load(tmp_path, name):
    content = wrappers(theirs(name))["dinov2" if "dinov2" in name else "deit"]
    report = convert_file(save(tmp_path, content), name, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        provenance = file.metadata()
    assert provenance["model"] == name
    assert len(provenance["source_sha256"]) == 64
    assert provenance["source"] == "https://github.com/davnords/octic-vits"
    assert ("NOT invariant" in provenance["invariants"]) == ("hybrid" in name)
    assert ("dropped" in provenance) == ("dinov2" in name)
    assert name in str(report)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, **VARIANTS[name].arguments).eval()
    expected, keywords = translate(theirs(name), name)
    assert not keywords
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_other_invariants_are_recognised_by_shape(tmp_path):
    """The DeiT III files may hold power invariants where their README counts polynomial ones."""
    name = "d4vit_large_patch16_224"
    state = octic_data.checkpoint("deit_power")
    assert [invariants_of(octic_data.checkpoint(f"deit_{kind}")) for kind in ("power", "polynomial", "hybrid")] == [
        "power",
        "polynomial",
        "",
    ]
    assert translate(state, name)[1] == {"invariants": "power"}
    convert_file(save(tmp_path, state), name, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["invariants"] == "power"
    with pytest.raises(
        ValueError, match=r"invariant_proj.weight of shape \(64, 50\) reads invariants that we do not know"
    ):
        invariants_of({"invariant_proj.weight": torch.zeros(64, 50)})


def test_half_precision_becomes_float32(tmp_path):
    name = "d4vit_large_patch16_224"
    state = {key: value.half() for key, value in theirs(name).items()}
    report = convert_file(save(tmp_path, state), name, tmp_path / "out")
    assert report.provenance["converted_dtypes"] == "float16 to float32"


@pytest.mark.parametrize("name", TABLE)
def test_another_models_checkpoint_is_refused_by_name(name):
    for other in TABLE.keys() - {name}:
        with pytest.raises(ValueError, match=f"this is no checkpoint of {name}, but of {other}: "):
            translate(theirs(other), name)
    assert fitting_models(theirs(name)) == [name]


def test_every_entry_is_needed_and_none_is_left(tmp_path):
    name = "d4vit_large_patch16_dinov2"
    state = theirs(name)
    model = timm.create_model(name, **translate(state, name)[1])
    for key in state:
        if key.startswith(("mask_token", "cls_token.")) and key != "cls_token.0":
            continue  # may be left out, or is zero
        with pytest.raises(ValueError, match="there is no entry"):
            translate_to(model, {other: value for other, value in state.items() if other != key})
    with pytest.raises(ValueError, match=r"1 entries are left over, such as register_tokens.0"):
        translate({**state, "register_tokens.0": torch.zeros(1)}, name)
    with pytest.raises(ValueError, match=r"cls_token.3 is not zero: this class token is not invariant"):
        translate({**state, "cls_token.3": state["cls_token.3"] + 1}, name)
    with pytest.raises(ValueError, match=r"norm.weight would have shape"):
        translate({**state, "norm.weight": torch.ones(65)}, name)


class Stranger:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"norm.weight": torch.tensor([float("nan")])}}, "holds NaN or infinity"),
        ({"model": {"norm.weight": "text"}}, "is a str, not a tensor"),
        ({"model": {}}, "holds no network"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"model": {"norm.weight": torch.ones(1).expand(1000)}}, "claims shape"),
        ({"model": {"norm.weight": torch.ones(3, dtype=torch.complex64)}}, "is of type complex64"),
        ({"model": {"norm.weight": torch.ones(3).long()}}, "is of type torch.int64, and octic-vits has none such"),
        ({"norm.weight": torch.ones(1), "module.norm.weight": torch.ones(1)}, "two entries for norm.weight"),
        ({"norm.weight": torch.ones(1), "backbone.norm.weight": torch.ones(1)}, "two entries for norm.weight"),
        ({"model": {"a": torch.ones(1)}, "args": Stranger()}, "is not read, for such a file can run code"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_octic(save(tmp_path, content))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_octic(tmp_path / "nothing.pth")
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><title>Google Drive")
    with pytest.raises(ValueError, match="no checkpoint but a web page"):
        read_octic(tmp_path / "page.pth")
    whole = save(tmp_path, {"model": {"a": torch.ones(1000)}}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is a damaged archive"):
        read_octic(tmp_path / "cut.pth")
    assert zipfile.is_zipfile(tmp_path / "checkpoint.pth")
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1  # in the tensor: torch alone would not see it
    (tmp_path / "spoilt.pth").write_bytes(spoilt)
    assert not torch.equal(torch.load(tmp_path / "spoilt.pth")["model"]["a"], torch.ones(1000))
    with pytest.raises(ValueError, match="has the wrong checksum"):
        read_octic(tmp_path / "spoilt.pth")
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    assert list(read_octic(tmp_path / "x.safetensors").tensors) == ["norm.weight"]


def test_only_this_room_allows_the_options_of_a_training_script(tmp_path):
    """And only while it reads: nothing stays allowed in the process."""
    path = save(tmp_path, {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=3e-3)})
    assert list(read_octic(path).tensors) == ["a"]
    with pytest.raises(ValueError, match="can run code"):
        read_checkpoint(path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("name", TABLE)
def test_fetch_takes_the_files_of_the_training_scripts(tmp_path, monkeypatch, name):
    """A download that is whole is read by this room's reader, converted, and found by `create_model`."""
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    content = wrappers(theirs(name))["dinov2" if "dinov2" in name else "deit"]
    save(tmp_path / "downloads", content, f"{name}.ckpt")
    fetch(name)
    assert not (tmp_path / "downloads" / f"{name}.ckpt").exists()
    weights = load_file(local_folder(name) / "model.safetensors")
    expected, _ = translate(theirs(name), name)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    name = "d4vit_large_patch16_224"
    with pytest.raises(ValueError, match=f"no checkpoint of {name}"):
        convert_file(save(tmp_path, theirs("d4hybridvit_large_patch16_224")), name, tmp_path / "out")
    with pytest.raises(ValueError, match="octic-vits has no weights of d4vit_base_patch16_224; there are: d4vit_large"):
        convert_file(tmp_path / "checkpoint.pth", "d4vit_base_patch16_224", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_released_checkpoints():
    names = [name for name in timm.list_models("d4*", module="equivariant_vit") if "large" in name or "huge" in name]
    released = released_in("octic")
    assert sorted(released) == sorted(names)
    assert len({entry.drive_id for entry in released.values()}) == 8
    for name, entry in released.items():
        assert entry.reported.keys() == ({"linear", "knn"} if "dinov2" in name else {"top1"})
        assert all(0.8 < value < 0.86 for value in entry.reported.values())
