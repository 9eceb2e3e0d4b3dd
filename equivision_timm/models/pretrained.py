"""Pretrained weights: from the local weights folder, `<weights folder>/c8resnet50.equivision_in1k`, else from the Hub.

Both are used only if the caller did not name a source: `hf-hub:`, `local-dir:`, `pretrained_cfg` and
`pretrained_cfg_overlay` with a source of their own are left to timm.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg

from equivision_timm.files import cache_folder

__all__ = [
    "HUB_ORG",
    "PUBLISHED",
    "TENSORS_SHA256",
    "WEIGHTS_FILE",
    "Published",
    "WeightsError",
    "build_model",
    "find_weights",
    "hash_tensors",
    "hub_id",
    "impossible_entries",
    "local_folder",
    "read_checked",
    "weights_folder",
]

HUB_ORG = "equivision-timm"  # the organisation on the Hub
WEIGHTS_FILE = "model.safetensors"
TENSORS_SHA256 = "tensors_sha256"  # the key in its metadata


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
    """The folder of a model in the local weights folder, e.g. `c8resnet50.equivision_in1k`; it need not exist."""
    return weights_folder() / f"{model_name}.{resolve_pretrained_cfg(model_name).tag or ''}".rstrip(".")


def build_model(
    network: type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with the file of `find_weights` for the converted weights of `variant`."""
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained and _is_converted(variant, resolve_pretrained_cfg(variant, pretrained_cfg, overlay)):
        overlay["file"] = str(find_weights(variant, kwargs.get("cache_dir")))
    return build_model_with_cfg(network, variant, pretrained, pretrained_cfg, overlay, **kwargs)


def _is_converted(variant: str, cfg: PretrainedCfg) -> bool:
    """Whether a configuration names the converted weights of `variant`, and no other source."""
    if cfg.source or cfg.state_dict or cfg.file or cfg.url:
        return False
    tag = resolve_pretrained_cfg(variant).tag or ""
    return (cfg.tag or "", cfg.hf_hub_id, cfg.hf_hub_filename) == (tag, hub_id(variant, tag), WEIGHTS_FILE)


def find_weights(model_name: str, cache_dir: str | Path | None = None) -> Path:
    """The checked safetensors file of a model, downloaded from the Hub if it is published and not there yet.

    Raises:
        WeightsError: no weights are found, or their file is damaged or holds another model.
    """
    folder = local_folder(model_name)
    file = folder / WEIGHTS_FILE
    if file.is_file():
        read_checked(file, model_name, None, f"delete it and run `python -m equivision_timm fetch {model_name}`")
    elif model_name in PUBLISHED:
        published = PUBLISHED[model_name]
        repository = f"{HUB_ORG}/{folder.name}"
        file = Path(hf_hub_download(repository, WEIGHTS_FILE, revision=published.revision, cache_dir=cache_dir))
        read_checked(file, model_name, published.tensors_sha256, "delete it and try again")
    else:
        raise WeightsError(
            f"no weights for {model_name}: there is no {file}. To get them, run `python -m equivision_timm fetch "
            f"{model_name}`"
        )
    return file


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
    """Entries and provenance (the metadata) of a safetensors file that holds this model.

    The hash of its tensors is compared with `tensors_sha256`, or if None with that of the metadata.

    Raises:
        WeightsError: the file is damaged, or holds another model, impossible entries or other tensors.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state_dict = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged or not a safetensors file ({error}): {remedy}") from error
    found = hash_tensors(state_dict)
    expected = tensors_sha256 or metadata.get(TENSORS_SHA256, found)
    if model_name and metadata.get("model", model_name) != model_name:
        problem = f"holds {metadata['model']!r}, not {model_name}"
    elif bad := impossible_entries(state_dict):
        problem = f"is damaged ({bad[0]} holds NaN, infinity, integers or negative variances)"
    elif found != expected:
        problem = f"is damaged (the hash of its tensors is {found}, not {expected!r})"
    else:
        return state_dict, {key: metadata[key] for key in sorted(metadata) if key != "format"}
    raise WeightsError(f"{file} {problem}: {remedy}")


def hash_tensors(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, independent of the order of entries and of strides.

    Example:
        >>> hash_tensors({"weight": torch.zeros(2, 3)})[:8] == hash_tensors({"weight": torch.zeros(3, 2)})[:8]
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        values = value.flatten().view(torch.uint8).numpy().data
        dtype = str(value.dtype).removeprefix("torch.")
        for part in (name.encode(), dtype.encode(), str(tuple(value.shape)).encode(), values):
            digest.update(len(part).to_bytes(8, "little"))  # separates the parts
            digest.update(part)
    return digest.hexdigest()
