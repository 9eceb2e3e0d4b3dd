"""Publication of weights: a folder with config, weights and model card, and its upload to the Hub.

Converted weights and their config are copied from the local weights folder. Weights of the tiny `test_*` models are
those of the package. All files are the same at each call, so that publishing again uploads nothing.
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
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, local_folder
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import CONFIG_FILE, load_strictly, write_config
from equivision_timm.weights.model_card import model_card
from equivision_timm.weights.released import released

__all__ = ["FILES", "models_in_weights_folder", "upload", "write_publication"]

FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")


def upload(model_name: str, organisation: str, private: bool = False) -> str:
    """Upload a model to the Hub under the user's login, download it again and compare the files.

    Args:
        model_name: a model in the local weights folder, or one whose weights are in the package.
        organisation: user or organisation on the Hub.
        private: create a private repository; an existing one is not changed.

    Returns:
        Address of the commit.

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
    """Write the files of an upload to a sub-folder of `parent`, named as the repository.

    Args:
        model_name: a model in the local weights folder, or one whose weights are in the package.
        parent: folder for the sub-folder.
        organisation: owner of the repository, for the card.

    Returns:
        The sub-folder.

    Raises:
        FileNotFoundError: the model is not in the local weights folder.
        InputError: nothing can be written to `parent`.
        WeightsError: config, metadata and tensors are not those of the conversion of this model.
    """
    packaged = {name: cfg.file for name in model_names() if (cfg := resolve_pretrained_cfg(name)).file}
    if model_name not in (*released(), *packaged):
        raise ValueError(f"{model_name} has no weights to publish; there are: {', '.join((*released(), *packaged))}")
    source = local_folder(model_name)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if model_name not in packaged and not (source / name).is_file():
            raise FileNotFoundError(
                f"there is no {source / name} to publish: run `python -m equivision_timm fetch {model_name}`"
            )
    validate_repo_id(f"{organisation}/{source.name}")
    for name in FILES:
        check_writable(parent / source.name / name, make_folders=True)
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=".writing-") as name:
        staging = Path(name)
        if model_name in packaged:
            with torch.device("meta"):
                write_config(timm.create_model(model_name), staging / CONFIG_FILE)
            shutil.copyfile(packaged[model_name], staging / WEIGHTS_FILE)
        else:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source / name, staging / name)
        loaded = load_strictly(str(staging))
        found = hash_tensors(loaded.state_dict)
        expected = found if model_name in packaged else loaded.provenance.get(TENSORS_SHA256)
        if loaded.name != model_name or found != expected:
            raise WeightsError(
                f"{source} holds {loaded.name} with tensors of the hash {found}, not {model_name} as it was converted, "
                f"{expected}: run `python -m equivision_timm fetch {model_name}` again"
            )
        has_classifier = json.loads((staging / CONFIG_FILE).read_text())["num_classes"] != 0
        card = model_card(model_name, f"{organisation}/{source.name}", loaded.provenance, has_classifier)
        (staging / "README.md").write_text(card, encoding="utf-8")
        publication = parent / source.name
        publication.mkdir(exist_ok=True)
        for name in FILES:
            (staging / name).replace(publication / name)
    return publication


def models_in_weights_folder() -> list[str]:
    """Names of the released models in the local weights folder."""
    return [name for name in released() if (local_folder(name) / WEIGHTS_FILE).is_file()]
