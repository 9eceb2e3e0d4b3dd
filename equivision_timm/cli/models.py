"""Models by the name that a user types, prepared as in the training of their checkpoint: loaded here for all commands.

A spec is `NAME` (a model of timm with its pretrained weights, maybe 'hf-hub:...' or 'local-dir:...') or
`NAME=CHECKPOINT`. A checkpoint of timm's `train.py` contains how the model was made and its images prepared.
"""

import argparse
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_pretrained_cfg, load_state_dict

from equivision_timm.data import ImageFolder
from equivision_timm.errors import InputError, one_line, reason, shortened

__all__ = ["Loaded", "check_spec", "class_titles", "load", "read_class_map", "short_name", "split_spec"]


@dataclass(frozen=True)
class Loaded:
    """A model that a command uses."""

    spec: str  # as the user typed it
    model: nn.Module  # in eval mode, with `num_classes`
    config: dict[str, Any]  # timm's data config, how images are prepared
    options: dict[str, Any]  # keywords of `create_model`, from its checkpoint and the command line

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.config["input_size"])

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.model.num_classes  # type: ignore[return-value]

    def class_names(self, given: list[str] | None = None) -> list[str]:
        """The names of all classes: those given, the pretrained weights' own, ImageNet's, else their numbers."""
        count = self.num_classes
        if given is not None and len(given) != count:
            raise InputError(f"--class-map has {len(given)} names, and {self.spec!r} has {count} classes: name each")
        own = (getattr(self.model, "pretrained_cfg", None) or {}).get("label_names")
        if given is None and not split_spec(self.spec)[1] and isinstance(own, list | tuple) and len(own) == count:
            given = [str(name) for name in own]
        subset = infer_imagenet_subset(self.model)
        info = ImageNetInfo(subset) if subset is not None else None
        return given or [info.index_to_description(i) if info else str(i) for i in range(count)]


def load(
    spec: str,
    size: int | None = None,
    num_classes: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    test_size: bool = False,
) -> Loaded:
    """The model of a spec, in eval mode on the CPU, as in the training of its checkpoint unless other arguments differ.

    Args:
        spec: `NAME` or `NAME=CHECKPOINT`.
        size: side of the images.
        num_classes: number of classes.
        model_kwargs: further keywords of `timm.create_model`.
        test_size: without `size` and training, images have the size at which the model is validated.

    Raises:
        InputError: unknown name, no weights, a checkpoint of another model or of other classes, no finite logits.
    """
    name, checkpoint = split_spec(check_spec(spec))
    pretrained = name == spec
    try:
        content, weights = ({}, {}) if pretrained else _read_checkpoint(checkpoint)
        if content.get("arch", name).partition(".")[0] != name.partition(".")[0]:
            raise ValueError(f"{checkpoint!r} is a checkpoint of {content['arch']!r}")
        training = {
            key: value for key, value in vars(content.get("args", argparse.Namespace())).items() if value is not None
        }
        options = {**_model_options(training), **(model_kwargs or {})}
        classes = num_classes or _count_classes(weights, name)
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, checkpoint_path=checkpoint, **options
        )
        own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", classes)
        if pretrained and classes not in (None, own):  # timm would replace the classifier by a random one
            raise ValueError(f"the pretrained weights have {own} classes, not {classes}")
        config = resolve_data_config(training, model=model, use_test_size=test_size)
        channels = config["input_size"][0]
        config["input_size"] = tuple(config["input_size"]) if size is None else (channels, size, size)
        config |= {key: adapt_to_chs(config[key], channels) for key in ("mean", "std")}  # as timm's loader does it
        _try(model.eval(), config["input_size"])
    except Exception as error:  # of timm, PyTorch, the Hub's client, pickle, zip and JSON
        remedy = (
            f"for other weights give {name}=CHECKPOINT"
            if pretrained
            else f"is {checkpoint!r} a checkpoint of {name!r}?"
        )
        raise InputError(f"cannot use {spec!r}: {reason(error, 400)}; {remedy}") from error
    _note_inexact_size(spec, model, config["input_size"][1:])
    return Loaded(spec, model, config, options)


def _read_checkpoint(path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What timm's `train.py` stores beside the weights, {} in other files; and the weights."""
    content = {}
    if not path.endswith(".safetensors"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True)
    return content, load_state_dict(path)


def _model_options(training: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `create_model` in the arguments of timm's train.py that shape a model or what it computes."""
    own = {"in_chans": training["input_size"][0]} if "input_size" in training else {}
    own |= {key: training[key] for key in ("in_chans", "bn_eps") if key in training}
    return {**training.get("model_kwargs", {}), **own, **({"global_pool": training["gp"]} if "gp" in training else {})}


def _count_classes(weights: dict[str, torch.Tensor], name: str) -> int | None:
    """The number of classes of the classifier among the weights; None if its name is unknown."""
    cfg = None if ":" in name else get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    weight = weights.get(f"{classifier[0] if isinstance(classifier, tuple) else classifier}.weight")  # distilled: two
    return None if weight is None else weight.shape[0]


@torch.inference_mode()
def _try(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Raise an error, before the work, unless the model computes finite logits of an image (C, H, W)."""
    logits = model(torch.zeros(1, *size))
    if not (isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.isfinite().all()):
        raise ValueError("it returns no finite logits [1, classes]")


def _note_inexact_size(spec: str, model: Any, size: tuple[int, int]) -> None:
    """Print to stderr if rotations by 90 degrees are not exact at the size of the images, and where they are."""
    if not hasattr(model, "exact_sizes") or model.is_exact(size):
        return
    sizes = dict.fromkeys(model.exact_sizes(max(size)))
    if size[0] != size[1] or size[0] not in sizes:  # else the group has rotations by 45 degrees, too
        text = f"{spec!r} is not exactly equivariant at {size[0]} x {size[1]} pixels: --size "
        print(one_line(f"{text}{' or '.join(map(str, sizes))} is exact"), file=sys.stderr)


def split_spec(spec: str) -> tuple[str, str]:
    """`NAME` or `NAME=CHECKPOINT` -> name, and checkpoint or ''; a folder after 'local-dir:' may contain '='."""
    if spec.startswith("local-dir:") and os.path.isdir(spec.removeprefix("local-dir:")):
        return spec, ""
    name, _, checkpoint = spec.partition("=")
    return name, checkpoint


def short_name(spec: str) -> str:
    """The spec without the path to its checkpoint or folder, for titles and for files that are passed on."""
    name, checkpoint = split_spec(spec)
    if name.startswith("local-dir:"):
        name = Path(name.removeprefix("local-dir:")).name
    return f"{name}={Path(checkpoint).name}" if checkpoint else name


def check_spec(spec: str) -> str:
    """The spec. Raises InputError if timm does not know the name."""
    name, _ = split_spec(spec)
    if ":" not in name and not timm.is_model(name):  # 'hf-hub:...' is looked up when it is loaded
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=4, cutoff=0.5)
        raise InputError(f"unknown model {name!r}: did you mean {', '.join(near) or 'one of timm.list_models()'}?")
    return spec


def class_titles(names: list[str]) -> list[str]:
    """Names of classes for pictures, at most 16 characters: ImageNet's first word, 'class 3' for a number."""
    titles = [f"class {name}" if name == str(index) else name.split(",")[0] for index, name in enumerate(names)]
    return [shortened(title, 16) for title in titles]


def read_class_map(path: str) -> list[str]:
    """The names of the classes in the order of their numbers: lines of a file, or sub-folders as timm numbers them."""
    if os.path.isdir(path):
        return [name for name in ImageFolder(path, "", search_split=False).class_to_idx if name]
    return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
