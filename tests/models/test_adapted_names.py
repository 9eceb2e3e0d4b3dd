"""The registered names: their configurations, and loading from a stand-in of the Hub, folders and checkpoints."""

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import _factory
from timm.models._hub import save_for_hf

from equivision_timm.models import Symmetrized, model_names

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = [name for name in model_names(Symmetrized) if "_" in name]


def test_every_name_has_the_tags_and_sources_of_its_backbone():
    assert len(NAMES) == 3 * 14
    for name in NAMES:
        kind, _, backbone = name.partition("_")
        assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(backbone).tag
        tagged = timm.list_pretrained(f"{backbone}.*")
        assert timm.list_pretrained(f"{name}.*") == [f"{kind}_{n}" for n in tagged]
        for plain in map(timm.get_pretrained_cfg, tagged):
            cfg = timm.get_pretrained_cfg(f"{name}.{plain.tag}")
            assert cfg.architecture == name
            assert cfg.hf_hub_id == plain.hf_hub_id == f"timm/{backbone}.{plain.tag}"
            assert (cfg.mean, cfg.std, cfg.input_size) == (plain.mean, plain.std, plain.input_size)


def test_probabilities_are_averaged_for_the_trained_classes_only():
    with torch.device("meta"):
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
        ("c4can_resnet18", {"choice": "soft"}),
        ("symmetrized", {"backbone": "test_vit", "group": "d2", "img_size": 64, "num_classes": 0}),
        ("canonicalized", {"backbone": "test_resnet", "group": "c8"}),
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

    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    resumed = timm.create_model(name, checkpoint_path=tmp_path / "checkpoint.pth", **options).eval()
    assert torch.equal(resumed(x), model(x))
    overlaid = {"file": str(tmp_path / "checkpoint.pth"), "num_classes": model.num_classes}
    if options.get("in_chans") != 1:  # timm would adapt the first convolution of three channels
        started = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlaid, **options).eval()
        assert torch.equal(started(x), model(x))


def test_other_classes_and_missing_entries(tmp_path):
    """A fine-tuned folder takes other classes; a checkpoint has to be complete."""
    model = timm.create_model("c4sym_resnet18", num_classes=3)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert other.num_classes == 7
    assert torch.equal(other.backbone.conv1.weight, model.backbone.conv1.weight)
    state = model.state_dict()
    del state["backbone.layer4.1.bn2.bias"]
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(RuntimeError, match="bn2"):
        timm.create_model("c4sym_resnet18", num_classes=3, checkpoint_path=tmp_path / "checkpoint.pth")


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


def test_weights_come_from_timms_repositories(tmp_path):
    """A cache of the Hub stands in for it."""
    plain = timm.create_model("resnet18")
    for tag in ("a1_in1k", "a2_in1k"):
        repository = tmp_path / f"models--timm--resnet18.{tag}"
        save_for_hf(plain, str(repository / "snapshots" / "commit"), safe_serialization=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("commit")
    for name in ("d4sym_resnet18", "c4can_resnet18.a2_in1k"):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path)
        assert all(torch.equal(model.backbone.state_dict()[key], value) for key, value in plain.state_dict().items())
    grey = timm.create_model("c4sym_resnet18", pretrained=True, cache_dir=tmp_path, in_chans=1)
    assert torch.allclose(grey.backbone.conv1.weight, plain.conv1.weight.sum(1, keepdim=True))
    with pytest.raises(LocalEntryNotFoundError):  # of huggingface_hub, as for timm's own names
        timm.create_model("c4sym_regnety_032", pretrained=True, cache_dir=tmp_path)


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
