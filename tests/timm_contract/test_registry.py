"""timm's list of models, and that every name builds what it says."""

import json
from functools import cache

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import equivision_timm  # noqa: F401  (registers the models)
from equivision_timm.groups import Group
from equivision_timm.models import model_names

GROUPS = ("c1", "d1", "c4", "d4", "c8", "d8")
NAMES = [f"{group}resnet{depth}{width}" for group in GROUPS for depth in (18, 50, 101) for width in ("", "_fast")]
MODELS = [name for name in model_names() if "d4sym_" not in name]  # made as c4sym_ are


def test_all_names_are_listed():
    assert set(NAMES) < set(model_names()) <= set(timm.list_models())
    assert not set(NAMES) & set(timm.list_models(module="resnet"))


@cache
def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name, in_chans=5)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_says_what_is_built(name):
    model, plain = on_meta(name), on_meta(name[2:].removesuffix("_fast"))
    assert model.group == name[:2]
    if name.endswith("_fast"):  # as many channels as the plain ResNet
        assert model.feature_info[0]["num_chs"] == {"d8resnet18_fast": 48}.get(name, 64)
    else:  # as many parameters
        assert 0.8 < sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in plain.parameters()) < 1.2
    assert model.num_features == model.head_hidden_size * Group.from_name(model.group).order


@pytest.mark.parametrize("name", MODELS)
def test_every_keyword_survives_json(name):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert json.loads(json.dumps(cfg))["architecture"] == name
    if "regnety" in name:
        try:
            on_meta(name.partition("_")[2])
        except NotImplementedError as error:
            pytest.skip(f"timm {timm.__version__} cannot make {name} on the meta device: {str(error)[:60]}")
    model = on_meta(name)
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 5  # what timm adapts to other image channels
    if "orient" in name:  # classifies orientations, has no invariant logits
        return
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    for use_test_size in (False, True):  # quarter turns are exact at the size that timm's scripts take
        size = resolve_model_data_config(model, use_test_size=use_test_size)["input_size"][1:]
        assert model.is_exact(size), size
