"""The command `publish`: converted weights on the Hub, with config and model card.

All files are the same at each call, so that publishing again uploads nothing.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from equivision_timm.cli.options import Parsers, add_command, add_names, for_each
from equivision_timm.files import check_writable
from equivision_timm.models.pretrained import HUB_ORG, TENSORS_SHA256, WEIGHTS_FILE, WeightsError, local_folder
from equivision_timm.weights.folder import CONFIG_FILE, load_strictly
from equivision_timm.weights.model_card import model_card
from equivision_timm.weights.released import released

__all__ = ["register", "upload", "write_publication"]

_CARD_FILE = "README.md"


def register(commands: Parsers) -> None:
    text = "upload weights to the Hub, or write the files of an upload"
    more = """Of each model in the local weights folder: config, weights and model card, under your login
        (`hf auth login`). The same command continues a broken upload."""
    parser = add_command(commands, "publish", run, text, more)
    add_names(parser, "every model in the local weights folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write to DIR/NAME.TAG instead of uploading")
    parser.add_argument("--org", default=HUB_ORG, help="user or organisation on the Hub (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="create private repositories")


def run(args: argparse.Namespace) -> int:
    """Publish all models, even if one fails; returns the exit status."""

    def publish(name: str) -> None:
        done = write_publication(name, args.to, args.org) if args.to else upload(name, args.org, args.private)
        print(f"{name}: {done}")

    names = args.names or [name for name in released() if (local_folder(name) / WEIGHTS_FILE).is_file()]
    if not names:
        print("the weights folder is empty: run `python -m equivision_timm fetch --all`", file=sys.stderr)
        return 1
    return for_each(names, publish)


def upload(model_name: str, organisation: str, private: bool = False) -> str:
    """Upload a model to the Hub under the user's login; returns the address of the commit.

    `private` creates a private repository; an existing one is not changed.
    """
    api = HfApi()
    with TemporaryDirectory() as folder:
        publication = write_publication(model_name, Path(folder), organisation)
        repository = f"{organisation}/{publication.name}"
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=publication, commit_message=f"Add {model_name}")
    return commit.commit_url


def write_publication(model_name: str, parent: Path, organisation: str) -> Path:
    """Write the files of an upload to a sub-folder of `parent`, named as the repository; returns the sub-folder."""
    source = local_folder(model_name)
    publication = parent / source.name
    for name in (CONFIG_FILE, WEIGHTS_FILE, _CARD_FILE):
        check_writable(publication / name)
    loaded = load_strictly(str(source))
    if loaded.name != model_name or TENSORS_SHA256 not in loaded.provenance:
        raise WeightsError(
            f"{source} holds {loaded.name}, not {model_name} with the hash of its conversion: run "
            f"`python -m equivision_timm fetch {model_name}` again"
        )
    publication.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, publication / name)
    card = model_card(model_name, f"{organisation}/{source.name}", loaded.provenance, loaded.model.num_classes > 0)
    (publication / _CARD_FILE).write_text(card, encoding="utf-8")
    return publication
