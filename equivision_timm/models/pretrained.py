"""Where pretrained weights come from: the local weights folder first, else the Hub, else an error that says how.

The local weights folder mirrors the Hub organisation, a folder for each repository:
`<weights folder>/c8resnet50.equivision_in1k/model.safetensors` next to its `config.json`. The folder is only consulted
where nobody named another source: an explicit `hf-hub:`, `local-dir:`, `pretrained_cfg` or `pretrained_cfg_overlay`
with a source of its own goes the way timm sends it.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError
from timm.models import PretrainedCfg, resolve_pretrained_cfg

__all__ = ["HUB_ORG", "WEIGHTS_FILE", "build_pretrained", "local_folder", "weights_folder"]

HUB_ORG = "equivision-timm"  # the organisation on the Hub
WEIGHTS_FILE = "model.safetensors"


def weights_folder() -> Path:
    """The local weights folder: $EQUIVISION_TIMM_WEIGHTS, by default `equivision_timm` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("EQUIVISION_TIMM_WEIGHTS") or f"{cache}/equivision_timm").expanduser()


def local_folder(hf_hub_id: str) -> Path:
    """Folder of the weights folder that holds what the Hub repository `hf_hub_id` holds."""
    return weights_folder() / hf_hub_id.split("/")[1]


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
        RuntimeError: neither the weights folder nor the Hub gives the weights, or the local file is damaged.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    build = partial(build, variant, pretrained=True, pretrained_cfg=pretrained_cfg, **kwargs)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if not _is_ours(cfg):
        return build(pretrained_cfg_overlay=overlay)

    file = local_folder(cfg.hf_hub_id) / WEIGHTS_FILE
    if not file.is_file():
        file = _download(variant, cfg.hf_hub_id, file, kwargs.get("cache_dir"))
    try:
        return build(pretrained_cfg_overlay={**overlay, "file": str(file)})
    except SafetensorError as error:
        raise RuntimeError(
            f"{file} is damaged ({error}): delete it and run `python -m equivision_timm fetch {variant}`"
        ) from error


def _download(variant: str, hf_hub_id: str, local_file: Path, cache_dir: str | Path | None) -> Path:
    """The file in the Hub's cache, downloaded if need be."""
    try:
        return Path(hf_hub_download(hf_hub_id, WEIGHTS_FILE, cache_dir=cache_dir))
    except Exception as error:  # errors of huggingface_hub, of its HTTP library, of the system
        raise RuntimeError(
            f"no weights for {variant}. Tried:\n"
            f"- the local weights folder: there is no {local_file}\n"
            f"- the Hub, {constants.ENDPOINT}/{hf_hub_id}: {type(error).__name__}: {error}\n"
            f"To get them, run `python -m equivision_timm fetch {variant}`"
        ) from error


def _is_ours(cfg: PretrainedCfg) -> bool:
    """Whether the weights are those of our Hub repository, and no other source was named."""
    other = cfg.source or cfg.state_dict or cfg.file or cfg.url
    return not other and (cfg.hf_hub_id or "").startswith(f"{HUB_ORG}/") and cfg.hf_hub_filename == WEIGHTS_FILE
