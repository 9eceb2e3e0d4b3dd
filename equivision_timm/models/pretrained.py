"""Where converted weights come from: the local weights folder first, else the Hub, else an error that says how.

The local weights folder holds a folder for each model: `<weights folder>/c8resnet50.equivision_in1k/model.safetensors`
next to its `config.json`. On the Hub are those of `PUBLISHED`, each at one commit and with one hash: no host is asked
for a model that is not there. Both places are only consulted where nobody named another source: an explicit `hf-hub:`,
`local-dir:`, `pretrained_cfg` or `pretrained_cfg_overlay` with a source of its own goes the way timm sends it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from equivision_timm.files import cache_folder
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors

__all__ = [
    "HUB_ORG",
    "PUBLISHED",
    "WEIGHTS_FILE",
    "Published",
    "WeightsError",
    "build_pretrained",
    "find_weights",
    "hub_id",
    "local_folder",
    "weights_folder",
]

HUB_ORG = "equivision-timm"  # the organisation on the Hub
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Published:
    """Weights on the Hub.

    Attributes:
        revision: the commit that `publish` named, 40 hexadecimal digits.
        tensors_sha256: hash of the tensors, as `publish` checked it and `verify` shows it.
    """

    revision: str
    tensors_sha256: str


class WeightsError(RuntimeError):
    """Weights of ours are nowhere, or their file is damaged or holds another model; the message says the remedy."""


PUBLISHED: dict[str, Published] = {}  # by name, e.g. "c8resnet50"; nothing has been published yet


def hub_id(model_name: str, tag: str) -> str | None:
    """`organisation/repository@commit` of a model on the Hub, None where it has not been published."""
    published = PUBLISHED.get(model_name)
    return f"{HUB_ORG}/{model_name}.{tag}@{published.revision}" if published else None


def _tag(model_name: str) -> str:
    """Of its weights, 'equivision_in1k'; '' for a model without."""
    return resolve_pretrained_cfg(model_name).tag or ""


def _with_tag(model_name: str) -> str:
    """'c8resnet50.equivision_in1k'; the name alone for a model without weights."""
    return f"{model_name}.{_tag(model_name)}".rstrip(".")


def weights_folder() -> Path:
    """The local weights folder: $EQUIVISION_TIMM_WEIGHTS, by default `cache_folder`, whose errors it raises."""
    named = os.environ.get("EQUIVISION_TIMM_WEIGHTS")
    return Path(named).expanduser() if named else cache_folder()


def local_folder(model_name: str) -> Path:
    """Folder of the weights folder for a model, e.g. 'c8resnet50', whether it exists or not."""
    return weights_folder() / _with_tag(model_name)


def build_pretrained(
    build: Callable[..., nn.Module],
    variant: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` with weights from the first place that has them.

    Args:
        build: `timm.models.build_model_with_cfg`, given the model class.
        variant: name of the model.
        pretrained_cfg: as in `timm.create_model`.
        pretrained_cfg_overlay: as in `timm.create_model`.
        **kwargs: the rest of what `build` takes.

    Raises:
        WeightsError: no place has the weights, or their file is damaged or holds something else.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    build = partial(build, variant, pretrained=True, pretrained_cfg=pretrained_cfg, **kwargs)
    if _is_ours(variant, resolve_pretrained_cfg(variant, pretrained_cfg, overlay)):
        overlay["file"] = str(find_weights(variant, kwargs.get("cache_dir")))
    return build(pretrained_cfg_overlay=overlay)


def find_weights(model_name: str, cache_dir: str | Path | None = None) -> Path:
    """The safetensors file with the original's weights for `model_name`, downloaded if need be, its tensors compared.

    Args:
        model_name: e.g. 'c8resnet50'.
        cache_dir: of downloads; None takes the cache of huggingface_hub.

    Raises:
        WeightsError: no place has the weights, or their file is damaged or holds something else.
    """
    file = local_folder(model_name) / WEIGHTS_FILE
    if file.is_file():
        _check(file, model_name, None, f"delete it and run `python -m equivision_timm fetch {model_name}`")
    elif model_name in PUBLISHED:
        file = _download(model_name, file, cache_dir)
        _check(file, model_name, PUBLISHED[model_name].tensors_sha256, "delete it and try again")
    else:
        raise WeightsError(
            f"no weights for {model_name}: there is no {file}, and none are published on the Hub yet. "
            f"To get them, run `python -m equivision_timm fetch {model_name}`"
        )
    return file


def _check(file: Path, model_name: str, tensors_sha256: str | None, remedy: str) -> None:
    """Raises WeightsError unless a file holds this model, with this hash; None: that of its own metadata, if any."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        found = hash_tensors(load_file(file))
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged ({error}): {remedy}") from error
    if metadata.get("model", model_name) != model_name:
        raise WeightsError(f"{file} holds {metadata['model']!r}, not {model_name}: {remedy}")
    expected = tensors_sha256 or metadata.get(TENSORS_SHA256, found)
    if found != expected:
        raise WeightsError(f"{file} is damaged (the hash of its tensors is {found}, not {expected!r}): {remedy}")


def _download(model_name: str, local_file: Path, cache_dir: str | Path | None) -> Path:
    """The file in the Hub's cache, downloaded if need be."""
    repository, revision = f"{HUB_ORG}/{_with_tag(model_name)}", PUBLISHED[model_name].revision
    try:
        return Path(hf_hub_download(repository, WEIGHTS_FILE, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # errors of huggingface_hub, of its HTTP library, of the system
        raise WeightsError(
            f"no weights for {model_name}. Tried:\n"
            f"- the local weights folder: there is no {local_file}\n"
            f"- the Hub, {constants.ENDPOINT}/{repository}, commit {revision}: {type(error).__name__}: {error}\n"
            f"To get them, run `python -m equivision_timm fetch {model_name}`"
        ) from error


def _is_ours(variant: str, cfg: PretrainedCfg) -> bool:
    """Whether they are the converted weights of `variant`, and no other source was named."""
    other = cfg.source or cfg.state_dict or cfg.file or cfg.url
    tag = _tag(variant)
    theirs = (cfg.tag or "", cfg.hf_hub_id, cfg.hf_hub_filename)
    return not other and theirs == (tag, hub_id(variant, tag), WEIGHTS_FILE)
