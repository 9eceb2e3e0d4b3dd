"""Publish weights: a folder with all that a Hub repository needs, and its upload.

A publication is `config.json`, `model.safetensors` and a model card. Converted weights and their config are those of
the local weights folder, bit by bit; those that the package carries, of the tiny `test_*` models, the package's own
file. All files are the same whenever they are written, so that publishing again uploads nothing.
"""

import filecmp
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import resolve_pretrained_cfg

from equivision_timm.files import check_writable
from equivision_timm.models import model_names
from equivision_timm.models.pretrained import WEIGHTS_FILE, local_folder
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import CONFIG_FILE, write_config
from equivision_timm.weights.model_card import model_card
from equivision_timm.weights.rooms import released
from equivision_timm.weights.strict_load import load_strictly

__all__ = ["FILES", "models_in_weights_folder", "upload", "write_publication"]

FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")


def upload(model_name: str, organisation: str, private: bool = False) -> str:
    """Upload `model_name` to the Hub under the user's own login, download it again and compare every bit.

    What the Hub has already is not sent again: a run that broke off goes on where it stopped.

    Args:
        model_name: a model in the local weights folder, or one whose weights the package carries.
        organisation: user or organisation on the Hub that will hold the repository.
        private: create the repository as a private one; one that exists stays what it is.

    Returns:
        Address of the commit that holds the files.

    Raises:
        FileNotFoundError: the model is not in the local weights folder.
        RuntimeError: the Hub returned other bytes than were sent.
    """
    api = HfApi()
    with TemporaryDirectory() as folder:
        publication = write_publication(model_name, Path(folder), organisation)
        repository = f"{organisation}/{publication.name}"
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=publication, commit_message=f"Add {model_name}")
        for name in FILES:
            copy = api.hf_hub_download(repository, name, revision=commit.oid, local_dir=Path(folder) / "copy")
            if not filecmp.cmp(publication / name, copy, shallow=False):
                raise RuntimeError(f"{repository}: the Hub returned another {name} than was sent: publish it again")
    return commit.commit_url


def write_publication(model_name: str, parent: Path, organisation: str) -> Path:
    """Write what would be uploaded to a sub-folder of `parent`, named as the repository.

    Args:
        model_name: a model in the local weights folder, or one whose weights the package carries.
        parent: where to make the folder.
        organisation: who will hold the repository; the card names it.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: the model is not in the local weights folder.
        InputError: nothing can be written to `parent`.
        ValueError: config, metadata and tensors do not make up this model, or not with the tensors of its conversion.
    """
    source = _folder(model_name)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if model_name not in _packaged() and not (source / name).is_file():
            raise FileNotFoundError(
                f"there is no {source / name} to publish: run `python -m equivision_timm fetch {model_name}`"
            )
    validate_repo_id(f"{organisation}/{source.name}")
    for name in FILES:
        check_writable(parent / source.name / name, make_folders=True)
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=".writing-") as staging:
        if model_name in _packaged():
            provenance = _take_packaged(Path(staging), model_name)
        else:
            provenance = _take_converted(Path(staging), model_name, source)
        config = json.loads((Path(staging) / CONFIG_FILE).read_text(encoding="utf-8"))
        has_classifier = config.get("model_args", {}).get("num_classes") != 0  # a detector's backbone has none
        card = model_card(model_name, f"{organisation}/{source.name}", provenance, has_classifier)
        (Path(staging) / "README.md").write_text(card, encoding="utf-8")
        publication = parent / source.name
        publication.mkdir(exist_ok=True)
        for name in FILES:
            (Path(staging) / name).replace(publication / name)
    return publication


def _take_packaged(folder: Path, model_name: str) -> dict[str, str]:
    """Write config and weights of a model whose weights the package carries; returns where they come from."""
    with torch.device("meta"):
        write_config(timm.create_model(model_name), folder / CONFIG_FILE)
    shutil.copyfile(_packaged()[model_name], folder / WEIGHTS_FILE)
    return load_strictly(str(folder)).provenance


def _take_converted(folder: Path, model_name: str, source: Path) -> dict[str, str]:
    """Copy config and weights from `source`; returns where they come from.

    Raises:
        ValueError: they are not the model's, or not with the tensors of its conversion.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, folder / name)
    remedy = f"run `python -m equivision_timm fetch {model_name}` again"
    loaded = load_strictly(str(folder))  # the copies, which nobody else changes
    if loaded.name != model_name:
        raise ValueError(f"{source} holds {loaded.name}, not {model_name}: {remedy}")
    expected, found = loaded.provenance.get(TENSORS_SHA256), hash_tensors(loaded.state_dict)
    if found != expected:
        raise ValueError(
            f"{source / WEIGHTS_FILE} holds tensors with the hash {found}, its conversion wrote {expected}: {remedy}"
        )
    return loaded.provenance


def models_in_weights_folder() -> list[str]:
    """Names of the released models that the local weights folder holds."""
    return [name for name in released() if (local_folder(name) / WEIGHTS_FILE).is_file()]


def _packaged() -> dict[str, Path]:
    """The files that the package carries, by model name."""
    files = {name: resolve_pretrained_cfg(name).file for name in model_names()}
    return {name: Path(file) for name, file in files.items() if file}


def _folder(model_name: str) -> Path:
    """The folder of the local weights folder; its name is that of the publication."""
    names = (*released(), *_packaged())
    if model_name not in names:
        raise ValueError(f"{model_name} has no weights to publish; there are: {', '.join(names)}")
    return local_folder(model_name)
