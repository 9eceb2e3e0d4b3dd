"""Checkpoints of octic-vits: the wrappers they come in, and those of other models."""

import json

import pytest
import timm
import torch
from support import octic_data

from equivision_timm.cli.fetch import fetch
from equivision_timm.cli.verify import verify
from equivision_timm.models.equivariant_vit import VARIANTS, Variant
from equivision_timm.models.pretrained import WeightsError, local_folder, read_checked
from equivision_timm.weights import octic
from equivision_timm.weights.convert import convert_file
from equivision_timm.weights.octic import invariants_of, translate, translate_to
from equivision_timm.weights.released import released

SIZE = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_heads": 2}
TABLE = {  # the published models at the size of the small reference cases
    "d4vit_large_patch16_224": ("deit_polynomial", "deit3_in1k", {"invariants": "polynomial", "num_classes": 10}),
    "d4vit_large_patch16_dinov2": ("dinov2_power", "dinov2_in1k", {"num_classes": 0}),
    "d4hybridvit_large_patch16_224": ("deit_hybrid", "deit3_in1k", {"invariants": "", "num_classes": 10}),
    "d4hybridvit_large_patch16_dinov2": ("dinov2_hybrid", "dinov2_in1k", {"invariants": "", "num_classes": 0}),
}
NAME, DINO = list(TABLE)[:2]


@pytest.fixture(autouse=True)
def small_table(monkeypatch):
    """The variants of octic-vits, small: their names and kinds are the published ones."""
    for name, (_, tag, keywords) in TABLE.items():
        monkeypatch.setitem(VARIANTS, name, Variant("", {**SIZE, **keywords}, {}, tag))
        monkeypatch.setitem(timm.get_pretrained_cfg(name).__dict__, "fixed_input_size", False)
    monkeypatch.setattr(octic, "models", lambda: list(TABLE))


def foreign(name):
    return octic_data.checkpoint(TABLE[name][0])


def wrapped(name):
    """As the training script of DeiT III or DINOv2 writes it."""
    state = foreign(name)
    if "dinov2" not in name:
        return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 399}
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.last_layer.weight_v": torch.ones(2, 2)}
    return {"teacher": {**{f"backbone._orig_mod.{key}": value for key, value in state.items()}, **heads}}


@pytest.mark.parametrize("name", TABLE)
def test_fetched_files_are_converted_and_found(tmp_path, monkeypatch, name):
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    torch.save(wrapped(name), tmp_path / "downloads" / f"{name}.ckpt")
    fetch(name)
    assert not (tmp_path / "downloads" / f"{name}.ckpt").exists()
    expected = translate(foreign(name), name)
    assert not expected.keywords
    weights, provenance = read_checked(local_folder(name) / "model.safetensors")
    assert weights.keys() == expected.state_dict.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.state_dict.items())
    assert provenance["source"] == "https://github.com/davnords/octic-vits"
    assert ("NOT invariant" in provenance["invariants"]) == ("hybrid" in name)
    assert ("dropped" in provenance) == ("dinov2" in name)


def test_other_invariants_are_recognised_by_shape(tmp_path):
    """The DeiT III files may hold power invariants where their README counts polynomial ones."""
    for kind in ("power", "polynomial", "hybrid"):
        assert invariants_of(octic_data.checkpoint(f"deit_{kind}")) == kind.replace("hybrid", "")
    torch.save(octic_data.checkpoint("deit_power"), tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", NAME, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["invariants"] == "power"
    assert {row.name: row.ok for row in verify(str(tmp_path / "out"))}["loads"]


@pytest.mark.parametrize("name", TABLE)
def test_another_models_checkpoint_is_refused(tmp_path, name):
    torch.save(foreign(name), tmp_path / "x.pth")
    for other in TABLE.keys() - {name}:
        with pytest.raises(RuntimeError, match=r"missing|Unexpected key|size mismatch"):
            convert_file(tmp_path / "x.pth", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_entry_is_needed_and_none_is_left():
    state, model = foreign(DINO), timm.create_model(DINO)
    for key in state:
        if key.startswith(("mask_token", "cls_token.")) and key != "cls_token.0":
            continue  # dropped, or zero
        with pytest.raises(WeightsError, match="missing"):
            translate_to(model, {other: value for other, value in state.items() if other != key})
    for changes, noun in (
        ({"register_tokens.0": torch.zeros(1)}, "register_tokens"),
        ({"cls_token.3": state["cls_token.3"] + 1}, "invariant"),
        ({"norm.weight": torch.ones(65)}, "size mismatch"),
        ({"norm.weight": torch.full((64,), float("nan"))}, "NaN"),
        ({"norm.weight": torch.ones(64).long()}, "integers"),
    ):
        with pytest.raises(RuntimeError, match=noun):
            model.load_state_dict(translate({**state, **changes}, DINO).state_dict)


def test_released_checkpoints():
    names = [name for name in timm.list_models("d4*", module="equivariant_vit") if "large" in name or "huge" in name]
    entries = {name: entry for name, entry in released().items() if entry.format == "octic"}
    assert sorted(entries) == sorted(names)
    assert len({entry.drive_id for entry in released().values()}) == len(released()) == 22
    for name, entry in entries.items():
        assert entry.reported.keys() == ({"linear", "knn"} if "dinov2" in name else {"top1"})
