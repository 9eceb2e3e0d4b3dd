"""Publication of weights: a folder with config, weights and model card, and its upload to the Hub.

Converted weights and their config are copied from the local weights folder. Weights of the tiny `test_*` models are
those of the package. All files are the same at each call, so that publishing again uploads nothing.
"""

import filecmp
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from huggingface_hub import HfApi
from timm.models import resolve_pretrained_cfg
from timm.models._hub import save_config_for_hf

from equivision_timm.files import check_writable
from equivision_timm.models import model_names
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, local_folder
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import CONFIG_FILE, load_strictly
from equivision_timm.weights.model_card import model_card
from equivision_timm.weights.released import released

__all__ = ["FILES", "models_in_weights_folder", "upload", "write_publication"]

FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")


def upload(model_name: str, organisation: str, private: bool = False) -> str:
    """Upload a model to the Hub under the user's login, download it again and compare the files.

    `private` creates a private repository; an existing one is not changed. Returns the address of the commit.

    Raises:
        RuntimeError: the Hub returned other bytes than were sent; and as `write_publication`.
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
    """Write the files of an upload to a sub-folder of `parent`, named as the repository; returns the sub-folder.

    Args:
        model_name: a model in the local weights folder, or one whose weights are in the package.
        parent: folder for the sub-folder.
        organisation: owner of the repository, for the card.

    Raises:
        ValueError: there are no weights of this model, and none were released.
        FileNotFoundError: the model is not in the local weights folder.
        InputError: nothing can be written to `parent`.
        WeightsError: config, metadata and tensors are not those of the conversion of this model.
    """
    packaged = resolve_pretrained_cfg(model_name).file if model_name in model_names() else None
    if not packaged and model_name not in released():
        raise ValueError(f"{model_name} has no weights to publish; there are: {', '.join(released())}, test_*")
    source = local_folder(model_name)
    if not packaged and not (source / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"there is no {source} to publish: run `python -m equivision_timm fetch {model_name}`")
    publication = parent / source.name
    for name in FILES:
        check_writable(publication / name, make_folders=True)
    loaded = load_strictly(model_name if packaged else str(source))
    found = hash_tensors(loaded.state_dict)
    if loaded.name != model_name or (not packaged and found != loaded.provenance.get(TENSORS_SHA256)):
        raise WeightsError(
            f"{source} holds {loaded.name} with tensors of the hash {found}, not {model_name} as it was converted: "
            f"run `python -m equivision_timm fetch {model_name}` again"
        )
    publication.mkdir(parents=True, exist_ok=True)
    if packaged:
        config = str(publication / CONFIG_FILE)
        save_config_for_hf(timm.create_model(model_name, device="meta"), config)
    else:
        shutil.copyfile(source / CONFIG_FILE, publication / CONFIG_FILE)
    shutil.copyfile(loaded.weights, publication / WEIGHTS_FILE)
    card = model_card(model_name, f"{organisation}/{source.name}", loaded.provenance, loaded.model.num_classes > 0)
    (publication / "README.md").write_text(card, encoding="utf-8")
    return publication


def models_in_weights_folder() -> list[str]:
    """Names of the released models in the local weights folder."""
    return [name for name in released() if (local_folder(name) / WEIGHTS_FILE).is_file()]
