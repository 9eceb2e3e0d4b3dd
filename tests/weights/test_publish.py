"""Publication: the folder of an upload, and its upload to a Hub in a folder."""

import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from support.small_models import narrow

from equivision_timm.cli import publish
from equivision_timm.cli.main import main
from equivision_timm.models.pretrained import HUB_ORG, TENSORS_SHA256, hash_tensors, local_folder
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.weights.model_card import model_card

NAMES = ("c4resnet18", "d1resnet18")
TAGGED = "c4resnet18.equivision_in1k"
PROVENANCE = {"source_sha256": "ab" * 32, "signs": "+-+"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights folder with two models."""
    folder = tmp_path_factory.mktemp("weights")
    with narrow(*NAMES):
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            write(folder, name, timm.create_model(name).state_dict())
        yield folder


def write(folder, name, state_dict, **provenance):
    """A model folder as a conversion writes it."""
    origin = {**PROVENANCE, TENSORS_SHA256: hash_tensors(state_dict), **provenance}
    write_model_folder(folder / f"{name}.equivision_in1k", name, state_dict, origin)


@pytest.fixture(autouse=True)
def environment(weights, monkeypatch):
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(weights))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CARDS = {  # phrases in the body, and phrases that must not be there
    "c8resnet50": (
        [
            f'timm.create_model("hf-hub:{HUB_ORG}/c8resnet50.tag", pretrained=True)',
            "the group C8. Its feature maps move with the image",
            "**Params (M):** 24.84",
            "GMACs at 225 x 225 (of ResNets with dense filters):** 44.37",
            "78.7 %",
            "n = 1 mod 32",
            f"source_sha256: `{PROVENANCE['source_sha256']}`",
            "signs: `+-+`",
            "licence: mit",
            "klee2023equivision",
        ],
        ["NOT", "octic", "han2"],
    ),
    "c8reresnet50": (["**Its logits are NOT invariant", "maps move with the image", "han2021redet"], ["klee2023"]),
    "d4vit_large_patch16_224": (
        ["logits do not change", "[1, 197, 1024]", "84.0 %", "224 x 224 pixels", "nordstrom2025octic"],
        ["NOT", "mod 32", "klee2023", "regular fields"],
    ),
    "d4vit_large_patch16_dinov2": (["pooled features do not change", "linear classifier", "vector = model("], ["NOT"]),
    "d4hybridvit_large_patch16_224": (
        ["**Its logits are NOT invariant", "There are none"],
        ["do not change", "exact,"],
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card(name):
    card = model_card(name, f"{HUB_ORG}/{name}.tag", {**PROVENANCE, "images": "a\n# Heading"})
    assert r"  - images: `a\n# Heading`" in card.splitlines()
    metadata = huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data
    assert metadata.library_name == "timm"
    assert metadata.pipeline_tag == ("image-feature-extraction" if "dinov2" in name else "image-classification")
    assert metadata.datasets == ["imagenet-1k"]
    body, (holds, omits) = card.split("---\n", 2)[2], CARDS[name]
    assert [words for words in holds if words not in " ".join(body.split())] == []
    assert [words for words in omits if words in " ".join(body.split())] == []


def test_the_backbone_of_a_detector_has_no_classifier(tmp_path, monkeypatch):
    """Its card shows neither classes nor accuracies, and counts no classifier."""
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path / "weights"))
    name, arguments = "c8reresnet50", {"num_classes": 0}
    with narrow(name):
        model = timm.create_model(name, **arguments)
        provenance = {**PROVENANCE, TENSORS_SHA256: hash_tensors(model.state_dict())}
        write_model_folder(
            tmp_path / "weights" / local_folder(name).name, name, model.state_dict(), provenance, arguments
        )
        card = (publish.write_publication(name, tmp_path / "out", HUB_ORG) / "README.md").read_text(encoding="utf-8")
    count = sum(parameter.numel() for parameter in model.parameters())
    for words in ("vector = model(", "pooled features do not change", f"**Params (M):** {count / 1e6:.4g}"):
        assert words in " ".join(card.split())
    assert not any(words in card for words in ("**Its logits", " %"))


def test_what_cannot_be_published(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("a file in the place of the folder")
    assert main(["publish", *NAMES, "--to", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(tmp_path))
    for name, noun, status in (("d8resnet18", "d8resnet18.equivision_in1k", 2), ("--all", "fetch --all", 1)):
        assert main(["publish", name, "--to", str(tmp_path / "out")]) == status
        assert noun in capsys.readouterr().err
    assert list(content(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    ("fault", "noun"), [("other tensors", "hash"), ("no hash", "hash"), ("another model", "d1resnet18")]
)
def test_what_was_changed_is_not_published(weights, tmp_path, monkeypatch, capsys, fault, noun):
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    monkeypatch.setenv("EQUIVISION_TIMM_WEIGHTS", str(folder))
    if fault == "another model":
        shutil.rmtree(folder / TAGGED)
        (folder / "d1resnet18.equivision_in1k").rename(folder / TAGGED)
    else:
        provenance = {TENSORS_SHA256: "0" * 64} if fault == "other tensors" else {}
        write_model_folder(folder / TAGGED, "c4resnet18", timm.create_model("c4resnet18").state_dict(), provenance)
    assert main(["publish", "c4resnet18", "--to", str(tmp_path / "out")]) == 1
    assert noun in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Hub:
    """The functions of `HfApi` that `upload` calls, with repositories in a folder."""

    def __init__(self, folder):
        self.folder, self.private = folder, {}

    def create_repo(self, repository, private, exist_ok):
        assert exist_ok
        self.private.setdefault(repository, private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/abc")


def test_upload(weights, tmp_path, monkeypatch, capsys):
    """The files of the weights folder; the code of the card runs on them."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    assert main(["publish", "--all"]) == 0
    output = capsys.readouterr().out
    for name in NAMES:
        repository = f"{HUB_ORG}/{name}.equivision_in1k"
        assert f"{name}: https://hub/{repository}/commit/abc" in output
        assert not hub.private[repository]
        files = content(hub.folder / repository)
        assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
        for file in ("config.json", "model.safetensors"):
            assert files[file] == (weights / f"{name}.equivision_in1k" / file).read_bytes()
        assert main(["publish", name, "--to", str(tmp_path / "out")]) == 0
        assert content(tmp_path / "out" / f"{name}.equivision_in1k") == files  # the same at each call
    snippet = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
    names = {"image": Image.new("RGB", (320, 240))}
    exec(snippet.replace(f"hf-hub:{repository}", f"local-dir:{hub.folder / repository}"), names)
    assert names["logits"].shape == (1, 1000)
    assert f"# {list(names['features'].shape)}\n" in snippet

    assert main(["publish", "c4resnet18", "--org", "someone", "--private"]) == 0
    assert hub.private[f"someone/{TAGGED}"]
    card = (hub.folder / "someone" / TAGGED / "README.md").read_text(encoding="utf-8")
    assert f'"hf-hub:someone/{TAGGED}"' in card
