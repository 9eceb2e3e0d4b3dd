"""The registered names: their configurations, and loading from a stand-in of the Hub, folders and checkpoints."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from support.hub_server import Hub
from timm.models import _factory
from timm.models._hub import save_for_hf

from equivision_timm.models import Symmetrized, model_names

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = [name for name in model_names(Symmetrized) if "_" in name]


def test_every_name_has_the_tags_and_sources_of_its_backbone():
    assert len(NAMES) == 3 * 14
    for name in NAMES:
        backbone = name.partition("_")[2]
        listed = timm.list_pretrained(f"{name}.*")
        assert [n.partition(".")[2] for n in listed] == [
            n.partition(".")[2] for n in timm.list_pretrained(f"{backbone}.*")
        ]
        assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(backbone).tag
        for tagged in listed:
            cfg = timm.get_pretrained_cfg(tagged)
            plain = timm.get_pretrained_cfg(f"{backbone}.{cfg.tag}")
            assert cfg.hf_hub_id == plain.hf_hub_id
            assert cfg.hf_hub_id.startswith("timm/")
            assert (cfg.mean, cfg.std, cfg.input_size) == (plain.mean, plain.std, plain.input_size)
            assert cfg.architecture == name


def test_probabilities_are_averaged_for_the_trained_classes_only():
    assert timm.create_model("d4sym_resnet18").group_pool == "prob"
    assert timm.create_model("d4sym_resnet18", num_classes=5).group_pool == "avg"
    assert timm.create_model("d4sym_resnet18", num_classes=0).group_pool == "avg"
    assert timm.create_model("d4sym_resnet18", group_pool="max").group_pool == "max"
    assert timm.create_model("c4can_resnet18").group_pool == "avg"
    assert timm.create_model("c4can_resnet18", choice="soft").group_pool == "prob"
    assert timm.create_model("symmetrized", backbone="resnet18").group_pool == "avg"


def test_names_follow_the_size_and_channels_of_their_backbone():
    with torch.device("meta"):
        model = timm.create_model("c4sym_vit_small_patch16_224", img_size=96, in_chans=12)
        assert model(torch.empty(1, 12, 96, 96)).shape == (1, 1000)
        grey = timm.create_model("c4can_resnet18", in_chans=1)
        assert grey(torch.empty(1, 1, 64, 64)).shape == (1, 1000)
        assert timm.create_model("d4sym_vit_small_patch14_dinov2").pretrained_cfg["input_size"] == (3, 518, 518)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("c4sym_resnet18", {"num_classes": 3, "in_chans": 1}),
        ("c4can_resnet18", {"num_classes": 3, "choice": "soft"}),
        ("symmetrized", {"backbone": "test_vit", "group": "d2", "img_size": 64, "num_classes": 0}),
        ("canonicalized", {"backbone": "test_resnet", "group": "c8"}),
        ("d4sym_resnet18", {}),
    ],
)
@torch.no_grad()
def test_folders_round_trip(tmp_path, name, options):
    model = timm.create_model(name, **options).eval()
    x = X[:, : model.in_chans]
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert again.group_pool == model.group_pool
    assert again.pretrained_cfg["first_conv"].startswith("backbone.")
    json.loads((tmp_path / "config.json").read_text())

    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    resumed = timm.create_model(name, checkpoint_path=tmp_path / "checkpoint.pth", **options).eval()
    assert torch.equal(resumed(x), model(x))
    overlaid = {"file": str(tmp_path / "checkpoint.pth"), "num_classes": model.num_classes}
    if options.get("in_chans") != 1:  # timm would adapt the first convolution of three channels
        started = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlaid, **options).eval()
        assert torch.equal(started(x), model(x))


def test_a_fine_tuned_folder_takes_other_classes(tmp_path):
    model = timm.create_model("c4sym_resnet18", num_classes=3)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert other.num_classes == 7
    assert torch.equal(other.backbone.conv1.weight, model.backbone.conv1.weight)


def test_checkpoints_load_strictly(tmp_path):
    model = timm.create_model("c4sym_resnet18")
    state = model.state_dict()
    del state["backbone.layer4.1.bn2.bias"]
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(RuntimeError, match="bn2"):
        timm.create_model("c4sym_resnet18", checkpoint_path=tmp_path / "checkpoint.pth")


@torch.no_grad()
def test_a_plain_file_loads_into_the_backbone(tmp_path):
    """As train.py's --pretrained-path passes it, with other classes; and as timm's scripts resolve a configuration."""
    plain = timm.create_model("resnet18")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = {"file": str(tmp_path / "plain.pth"), "num_classes": -1}
    for name, options in (("d4sym_resnet18", {}), ("symmetrized", {"backbone": "resnet18"})):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, **options)
        assert torch.equal(model.backbone.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
        overlaid = {"file": str(tmp_path / "plain.pth")}
        arguments = _factory.resolve_model_input_args(name, pretrained_cfg_overlay=overlaid, **options)
        resolved = timm.create_model(pretrained=True, **arguments)
        assert torch.equal(resolved.backbone.fc.weight, plain.fc.weight)
        assert resolved.pretrained_cfg["interpolation"] == timm.get_pretrained_cfg("resnet18").interpolation


LOAD = """
import json, sys, timm, torch, equivision_timm
results = {}
for name, options in json.loads(sys.argv[1]):
    try:
        model = timm.create_model(name, pretrained=True, cache_dir=sys.argv[2], **options)
        total = sum(p.double().sum().item() for p in model.backbone.parameters())
        results[name] = [total, model.backbone.conv1.weight.shape[1]]
    except Exception as error:
        results[name] = str(error)
print(json.dumps(results))
"""


def test_weights_come_from_timms_repositories(tmp_path):
    """In a process whose Hub is the stand-in; huggingface_hub reads the address when it is imported."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet18")
    save_for_hf(plain, str(tmp_path / "plain"), safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    total = sum(p.double().sum().item() for p in plain.parameters())
    names = [("d4sym_resnet18", {}), ("c4can_resnet18.a2_in1k", {}), ("c4sym_resnet18", {"in_chans": 1})]
    with Hub() as hub:
        hub.add("timm/resnet18.a1_in1k", files)
        hub.add("timm/resnet18.a2_in1k", files)
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", LOAD, json.dumps([*names, ("d4sym_resnet50", {})]), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["d4sym_resnet18"] == results["c4can_resnet18.a2_in1k"] == [pytest.approx(total), 3]
    assert results["c4sym_resnet18"][1] == 1
    assert "resnet50.a1_in1k" in results["d4sym_resnet50"]  # which the Hub does not have
    assert (tmp_path / "cache" / "models--timm--resnet18.a1_in1k").is_dir()


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("symmetrized", {"backbone": "resnet19"}, RuntimeError, "resnet19"),
        ("symmetrized", {"group": "c5"}, ValueError, "c5"),
        ("symmetrized", {"backbone": "test_c8resnet"}, ValueError, "equivariant"),
        ("symmetrized", {"backbone": "c4sym_resnet18"}, ValueError, "equivariant"),
        ("symmetrized", {"group_pool": "prob", "num_classes": 1}, ValueError, "prob"),
        ("symmetrized", {"group_pool": "median"}, ValueError, "median"),
        ("symmetrized", {"train_views": 2}, ValueError, "train_views"),
        ("symmetrized", {"widht": 3}, TypeError, "widht"),
        ("symmetrized", {"backbone": torch.nn.Identity()}, TypeError, "name"),
        ("canonicalized", {"group": "d4"}, RuntimeError, "d4orient_lite0"),
        ("canonicalized", {"orientation": "c8orient_tiny"}, ValueError, "c8"),
        ("canonicalized", {"orientation": "resnet18"}, ValueError, "c4"),
        ("canonicalized", {"choice": "best"}, ValueError, "choice"),
        ("canonicalized", {"group_pool": "prob"}, ValueError, "prob"),
        ("canonicalized", {"gate": 1.5}, ValueError, "gate"),
        ("c4orient_tiny", {"num_classes": 5}, ValueError, "num_classes"),
    ],
)
def test_bad_input(name, options, error, match):
    with pytest.raises(error, match=match):
        timm.create_model(name, **options)
