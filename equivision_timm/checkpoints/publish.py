"""Publish converted weights: a folder with all that a Hub repository needs, and its upload.

A publication is `config.json` and `model.safetensors` of the local weights folder, bit by bit, and a model card. The
card is the same whenever it is written, so that publishing again uploads nothing.
"""

import filecmp
import shutil
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id
from timm.models import model_entrypoint
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.arguments import one_line
from equivision_timm.checkpoints.folder import CONFIG_FILE
from equivision_timm.checkpoints.rooms import Released, released
from equivision_timm.checkpoints.strict_load import load_strictly
from equivision_timm.files import check_writable
from equivision_timm.models.attributes import attribute
from equivision_timm.models.pretrained import WEIGHTS_FILE, local_folder
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors

__all__ = ["FILES", "complexity", "models_in_weights_folder", "upload", "write_publication"]

FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")


def upload(model_name: str, organisation: str, private: bool = False) -> str:
    """Upload `model_name` to the Hub under the user's own login, download it again and compare every bit.

    What the Hub has already is not sent again: a run that broke off goes on where it stopped.

    Args:
        model_name: a model in the local weights folder.
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
        model_name: a model in the local weights folder.
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
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"there is no {source / name} to publish: run `python -m equivision_timm fetch {model_name}`"
            )
    validate_repo_id(f"{organisation}/{source.name}")
    for name in FILES:
        check_writable(parent / source.name / name, make_folders=True)
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent, prefix=".writing-") as staging:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(source / name, Path(staging) / name)
        provenance = _check_files(Path(staging), model_name, source)  # the copies, which nobody else changes
        card = model_card(model_name, f"{organisation}/{source.name}", provenance)
        (Path(staging) / "README.md").write_text(card, encoding="utf-8")
        publication = parent / source.name
        publication.mkdir(exist_ok=True)
        for name in FILES:
            (Path(staging) / name).replace(publication / name)
    return publication


def _check_files(folder: Path, model_name: str, source: Path) -> dict[str, str]:
    """Where the weights in `folder`, a copy of `source`, come from; raises ValueError unless they are the model's."""
    remedy = f"run `python -m equivision_timm fetch {model_name}` again"
    loaded = load_strictly(str(folder))
    if loaded.name != model_name:
        raise ValueError(f"{source} holds {loaded.name}, not {model_name}: {remedy}")
    expected, found = loaded.provenance.get(TENSORS_SHA256), hash_tensors(loaded.state_dict)
    if found != expected:
        raise ValueError(
            f"{source / WEIGHTS_FILE} holds tensors with the hash {found}, its conversion wrote {expected}: {remedy}"
        )
    return loaded.provenance


def model_card(model_name: str, repository: str, provenance: dict[str, str]) -> str:
    """The model card, Markdown with the Hub's metadata in front."""
    entry = released()[model_name]
    parameters, gmacs = complexity(model_name)
    with torch.device("meta"):
        model = timm.create_model(model_name)
    fields, channels = attribute(model, "feature_info", list)[-1]["num_fields"], attribute(model, "num_features", int)
    license = attribute(model, "pretrained_cfg", dict)["license"]
    metadata = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "equivariance", "group-convolution"],
        datasets=["imagenet-1k"],
        model_name=repository.split("/")[1],
        eval_results=[_reported(entry, kind) for kind in entry.reported],
    )
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        metadata=metadata.to_yaml(),
        name=repository.split("/")[1],
        license=license,
        description=model_entrypoint(model_name).__doc__,
        project=entry.project,
        source=entry.source,
        repository=repository,
        channels=channels,
        fields=fields,
        order=channels // fields,
        parameters=f"{parameters / 1e6:.2f}",
        gmacs=f"{gmacs:.2f}",
        reported="\n".join(
            f"| Reported {_KINDS[kind]} on ImageNet-1k at 224 x 224 | {100 * value:.1f} % |"
            for kind, value in entry.reported.items()
        ),
        provenance="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in provenance.items()),
    )


def _cell(text: str) -> str:
    """Text as text in a table of Markdown: neither line breaks nor markup."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def models_in_weights_folder() -> list[str]:
    """Names of the released models that the local weights folder holds."""
    return [name for name in released() if (local_folder(name) / WEIGHTS_FILE).is_file()]


def complexity(model_name: str, size: int = 224) -> tuple[int, float]:
    """Number of parameters, and 10^9 multiply-accumulates of one image of size x size pixels.

    Counted with PyTorch's flop counter on the fused network, whose convolutions have expanded filters: convolutions and
    matrix products, attention included. Nothing is computed: the tensors are on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(model_name).eval()
        parameters = sum(p.numel() for p in model.parameters())
        fused = reparameterize_model(model.requires_grad_(False))  # the counter follows what asks for gradients
        with FlopCounterMode(display=False) as counter:
            fused(torch.empty(1, 3, size, size))
    return parameters, counter.get_total_flops() / 2 / 1e9


def _folder(model_name: str) -> Path:
    if model_name not in released():
        raise ValueError(f"{model_name} has no weights to publish; there are: {', '.join(released())}")
    return local_folder(model_name)


_KINDS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "linear": "top-1 accuracy of a linear classifier on frozen features",
    "knn": "top-1 accuracy of nearest neighbours of frozen features",
}


def _reported(entry: Released, kind: str) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="imagenet-1k",
        dataset_name="ImageNet-1k",
        metric_type="accuracy",
        metric_name=_KINDS[kind],
        metric_value=entry.reported[kind],
        source_name=f"{entry.project}, as reported",
        source_url=entry.source,
    )
