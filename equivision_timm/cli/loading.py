"""Models by the name a user types, with errors that say what to do; for the sub-commands."""

import difflib
import os
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from equivision_timm.arguments import InputError
from equivision_timm.models.pretrained import WeightsError

__all__ = ["check_model_name", "load_model", "short_name", "split_spec"]


def split_spec(spec: str) -> tuple[str, str]:
    """`NAME` or `NAME=CHECKPOINT` -> name and checkpoint, '' without one; a folder after 'local-dir:' may hold '='."""
    if spec.startswith("local-dir:") and os.path.isdir(spec.removeprefix("local-dir:")):
        return spec, ""
    name, _, checkpoint = spec.partition("=")
    return name, checkpoint


def short_name(spec: str) -> str:
    """`NAME=CHECKPOINT` and `local-dir:FOLDER` without the path to them, for titles."""
    name, checkpoint = split_spec(spec)
    if name.startswith("local-dir:"):
        name = Path(name.removeprefix("local-dir:")).name
    return f"{name}={Path(checkpoint).name}" if checkpoint else name


def check_model_name(spec: str) -> None:
    """Look at `NAME` or `NAME=CHECKPOINT` without loading anything.

    Raises:
        InputError: with near names, where timm does not know the name; where there is no such checkpoint or folder.
    """
    name, checkpoint = split_spec(spec)
    if name != spec and not checkpoint:
        raise InputError(f"{spec!r} names no checkpoint after the '=': give a file, {name}=CHECKPOINT, or leave it out")
    if name.startswith("local-dir:") and not os.path.isdir(name.removeprefix("local-dir:")):
        raise InputError(f"there is no folder {name.removeprefix('local-dir:')!r} to load {name!r} from")
    if ":" not in name and not timm.is_model(name):  # 'hf-hub:...' is looked up when it is loaded
        architecture = name.partition(".")[0]
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        raise InputError(f"unknown model {name!r}{_suggest(near)}; python -c 'import timm; print(timm.list_models())'")
    if checkpoint and not os.path.isfile(checkpoint):
        raise InputError(f"cannot load the weights of {spec!r}: there is no file {checkpoint!r}")


def load_model(spec: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """The model of `NAME` with its pretrained weights, or of `NAME=CHECKPOINT` with those of a file, in eval mode.

    Args:
        spec: a name timm knows (with a tag if need be, or 'hf-hub:...', 'local-dir:...'), and maybe a checkpoint.
        num_classes: classes of the classifier; the model's own where None.
        **options: other keywords of `timm.create_model`, as a checkpoint was trained with.

    Raises:
        InputError: unknown name or tag, no pretrained weights, no way to fetch them, an unfit checkpoint, pretrained
            weights of another number of classes (timm would put a random classifier in their place).
    """
    check_model_name(spec)
    name, checkpoint = split_spec(spec)
    try:
        model = timm.create_model(
            name, pretrained=not checkpoint, num_classes=num_classes, checkpoint_path=checkpoint or None, **options
        )
    except WeightsError as error:
        raise InputError(f"cannot load the weights of {spec!r}: {error}; or {_own_file(name)}") from error
    except Exception as error:  # of timm, PyTorch, the Hub's client, pickle, zip and JSON: any file can be at fault
        raise InputError(
            f"cannot load the weights of {spec!r}: {_reason(error)}. {_remedy(name, checkpoint)}"
        ) from error
    own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if not checkpoint and num_classes is not None and own is not None and own != num_classes:
        raise InputError(
            f"the weights of {spec!r} tell {own} classes apart, not {num_classes}: leave --num-classes out, or give a "
            f"file with as many, {name}=CHECKPOINT"
        )
    return model.eval()


def _reason(error: Exception) -> str:
    """What an error says in its first lines, of which PyTorch may write hundreds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _remedy(name: str, checkpoint: str) -> str:
    if checkpoint:
        return f"Is {checkpoint!r} a checkpoint of {name!r}, with as many classes?"
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and tags and name not in tags:
        return f"Its pretrained tags are {', '.join(tags)}."
    if tags:
        return f"Pretrained weights are fetched once over the network: connect, set HF_ENDPOINT, or {_own_file(name)}."
    return f"It has no pretrained weights: {_own_file(name)}."


def _own_file(name: str) -> str:
    return f"give a file, {name}=CHECKPOINT"


def _suggest(near: list[str]) -> str:
    return f": did you mean {', '.join(near)}?" if near else ""
