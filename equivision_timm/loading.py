"""Models by the name a user types, with errors that say what to do; for the sub-commands."""

import difflib

import timm
import torch.nn as nn
from safetensors import SafetensorError

__all__ = ["InputError", "check_model_name", "load_model"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what and how to mend it."""


def check_model_name(spec: str) -> None:
    """Raises InputError, with near names, where timm does not know the model of `NAME` or `NAME=CHECKPOINT`."""
    name = spec.partition("=")[0]
    if ":" in name or timm.is_model(name):  # 'hf-hub:...' and 'local-dir:...' are looked up when they are loaded
        return
    architecture = name.partition(".")[0]
    near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
    raise InputError(f"unknown model {name!r}{_suggest(near)}; python -c 'import timm; print(timm.list_models())'")


def load_model(spec: str, num_classes: int | None = None) -> nn.Module:
    """The model of `NAME` with its pretrained weights, or of `NAME=CHECKPOINT` with those of a file, in eval mode.

    Args:
        spec: a name timm knows (with a tag if need be, or 'hf-hub:...', 'local-dir:...'), and maybe a checkpoint.
        num_classes: classes of the classifier; the model's own where None.

    Raises:
        InputError: unknown name or tag, no pretrained weights, no way to fetch them, an unfit checkpoint.
    """
    check_model_name(spec)
    name, _, checkpoint = spec.partition("=")
    try:
        model = timm.create_model(
            name, pretrained=not checkpoint, num_classes=num_classes, checkpoint_path=checkpoint or None
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the weights of {spec!r}: {reason}. {_remedy(name, checkpoint)}") from error
    return model.eval()


def _remedy(name: str, checkpoint: str) -> str:
    if checkpoint:
        return f"Is {checkpoint!r} a checkpoint of {name!r}, with as many classes?"
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and tags and name not in tags:
        return f"Its pretrained tags are {', '.join(tags)}."
    own_file = f"give a file, {name}=CHECKPOINT"
    if tags:
        return f"Pretrained weights are fetched once over the network: connect, set HF_ENDPOINT, or {own_file}."
    return f"It has no pretrained weights: {own_file}."


def _suggest(near: list[str]) -> str:
    return f": did you mean {', '.join(near)}?" if near else ""
