"""Pretrained weights: from the local weights folder, `<weights folder>/c8resnet50.equivision_in1k`, else from the Hub.

Both are used only if the caller did not name a source: `hf-hub:`, `local-dir:`, `pretrained_cfg` and
`pretrained_cfg_overlay` with a source of their own are left to timm.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError, safe_open
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
    "impossible_entries",
    "local_folder",
    "read_checked",
    "read_safetensors",
    "weights_folder",
]

HUB_ORG = "equivision-timm"  # the organisation on the Hub
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Published:
    """Weights on the Hub: the commit, 40 hexadecimal digits, and the hash of the tensors."""

    revision: str
    tensors_sha256: str


class WeightsError(RuntimeError):
    """Weights that are missing or damaged, or belong to another model."""


PUBLISHED: dict[str, Published] = {}  # by model name, e.g. "c8resnet50"


def hub_id(model_name: str, tag: str) -> str | None:
    """`organisation/repository@commit` of a model on the Hub, None if it has not been published."""
    published = PUBLISHED.get(model_name)
    return f"{HUB_ORG}/{model_name}.{tag}@{published.revision}" if published else None


def weights_folder() -> Path:
    """The local weights folder: $EQUIVISION_TIMM_WEIGHTS, by default `cache_folder`."""
    named = os.environ.get("EQUIVISION_TIMM_WEIGHTS")
    return Path(named).expanduser() if named else cache_folder()


def local_folder(model_name: str) -> Path:
    """The folder of a model, e.g. 'c8resnet50', in the local weights folder; it need not exist."""
    return weights_folder() / _with_tag(model_name)


def build_pretrained(
    build: Callable[..., nn.Module],
    variant: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build `variant` with pretrained weights by `build`, timm's `build_model_with_cfg` with the model class."""
    overlay = dict(pretrained_cfg_overlay or {})
    build = partial(build, variant, pretrained=True, pretrained_cfg=pretrained_cfg, **kwargs)
    if not _is_converted(variant, resolve_pretrained_cfg(variant, pretrained_cfg, overlay)):
        return build(pretrained_cfg_overlay=overlay)
    file = find_weights(variant, kwargs.get("cache_dir"))
    try:
        return build(pretrained_cfg_overlay={**overlay, "file": str(file)})
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise WeightsError(f"{file} does not fit {variant}: {' '.join(str(error).split())[:500]}") from error


def find_weights(model_name: str, cache_dir: str | Path | None = None) -> Path:
    """The checked safetensors file of a model, downloaded from the Hub if it is published and not there yet.

    Raises:
        WeightsError: no weights are found, or their file is damaged or holds another model.
    """
    file = local_folder(model_name) / WEIGHTS_FILE
    if file.is_file():
        read_checked(file, model_name, None, f"delete it and run `python -m equivision_timm fetch {model_name}`")
    elif model_name in PUBLISHED:
        file = _download(model_name, file, cache_dir)
        read_checked(file, model_name, PUBLISHED[model_name].tensors_sha256, "delete it and try again")
    else:
        raise WeightsError(
            f"no weights for {model_name}: there is no {file}. To get them, run `python -m equivision_timm fetch "
            f"{model_name}`"
        )
    return file


def read_safetensors(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Entries and provenance (the metadata) of a safetensors file; raises WeightsError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state_dict = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged or not a safetensors file: {error}") from error
    return state_dict, {key: metadata[key] for key in sorted(metadata) if key != "format"}


def impossible_entries(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Entries with NaN, values beyond float32, negative variances, or of a dtype other than floating point."""
    bad = []
    for name, value in state_dict.items():
        is_count = name.endswith("num_batches_tracked") or "indices_" in name  # indices of escnn
        possible = (value.is_floating_point() or is_count) and bool(value.float().isfinite().all())
        if not possible or (name.endswith("running_var") and bool((value < 0).any())):
            bad.append(name)
    return bad


def read_checked(
    file: Path, model_name: str | None = None, tensors_sha256: str | None = None, remedy: str = "convert it again"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`read_safetensors` of a file that holds this model, with this hash of its tensors or that of its metadata.

    Raises:
        WeightsError: the file is damaged, or holds another model, impossible entries or other tensors.
    """
    try:
        state_dict, metadata = read_safetensors(file)
    except WeightsError as error:
        raise WeightsError(f"{error}: {remedy}") from error
    found = hash_tensors(state_dict)
    expected = tensors_sha256 or metadata.get(TENSORS_SHA256, found)
    if model_name and metadata.get("model", model_name) != model_name:
        problem = f"holds {metadata['model']!r}, not {model_name}"
    elif bad := impossible_entries(state_dict):
        problem = f"is damaged ({bad[0]} holds NaN, infinity, integers or negative variances)"
    elif found != expected:
        problem = f"is damaged (the hash of its tensors is {found}, not {expected!r})"
    else:
        return state_dict, metadata
    raise WeightsError(f"{file} {problem}: {remedy}")


def _download(model_name: str, local_file: Path, cache_dir: str | Path | None) -> Path:
    repository, revision = f"{HUB_ORG}/{_with_tag(model_name)}", PUBLISHED[model_name].revision
    try:
        return Path(hf_hub_download(repository, WEIGHTS_FILE, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # of huggingface_hub, its HTTP library, the operating system
        raise WeightsError(
            f"no weights for {model_name}: there is no {local_file}, and {constants.ENDPOINT}/{repository}, commit "
            f"{revision}, fails ({type(error).__name__}: {error}). Run `python -m equivision_timm fetch {model_name}`"
        ) from error


def _with_tag(model_name: str) -> str:
    """'c8resnet50.equivision_in1k'; the name only for a model without weights."""
    return f"{model_name}.{resolve_pretrained_cfg(model_name).tag or ''}".rstrip(".")


def _is_converted(variant: str, cfg: PretrainedCfg) -> bool:
    """Whether a configuration names the converted weights of `variant`, and no other source."""
    if cfg.source or cfg.state_dict or cfg.file or cfg.url:
        return False
    tag = resolve_pretrained_cfg(variant).tag or ""
    return (cfg.tag or "", cfg.hf_hub_id, cfg.hf_hub_filename) == (tag, hub_id(variant, tag), WEIGHTS_FILE)
