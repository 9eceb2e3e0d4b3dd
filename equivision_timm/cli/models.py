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
from typing import Any, cast

import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import clean_state_dict, get_pretrained_cfg

from equivision_timm.data import ImageFolder
from equivision_timm.errors import InputError, one_line, reason, shortened

__all__ = ["Loaded", "check_spec", "class_titles", "find_device", "load", "read_class_map", "short_name", "split_spec"]


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
        if given is not None:
            if len(given) != count:
                raise InputError(
                    f"--class-map has {len(given)} names, and {self.spec!r} has {count} classes: name each"
                )
            return given
        own = (getattr(self.model, "pretrained_cfg", None) or {}).get("label_names")
        if not split_spec(self.spec)[1] and isinstance(own, list | tuple) and len(own) == count:
            return [str(name) for name in own]
        subset = infer_imagenet_subset(self.model)
        if subset is not None:
            info = ImageNetInfo(subset)
            return [info.index_to_description(index) for index in range(count)]
        return [str(index) for index in range(count)]

    @torch.inference_mode()
    def try_image(self, image: torch.Tensor) -> None:
        """Raise InputError, before the work, unless the model computes finite logits of an image [C, H, W]."""
        height, width = image.shape[1:]
        try:
            logits = self.model(image[None])
            usable = isinstance(logits, torch.Tensor) and logits.ndim == 2 and bool(logits.isfinite().all())
            fault = "" if usable else "it returns no finite logits (1, classes); use a classifier, or other weights"
        except (ValueError, AssertionError, IndexError, TypeError, RuntimeError) as error:
            fault = reason(error, 2)
        if fault:
            raise InputError(f"{self.spec!r} does not take images of {height} x {width} pixels: {fault}")
        self.note_inexact_size()

    def note_inexact_size(self) -> None:
        """Print to stderr if rotations by 90 degrees are not exact at the size of the images, and where they are."""
        size, model = self.input_size[1:], cast(Any, self.model)
        if not hasattr(model, "exact_sizes") or model.is_exact(size):
            return
        sizes = dict.fromkeys(model.exact_sizes(max(size)))
        if size[0] != size[1] or size[0] not in sizes:  # else the group has rotations by 45 degrees, too
            text = f"{self.spec!r} is not exactly equivariant at {size[0]} x {size[1]} pixels: --size "
            print(one_line(f"{text}{' or '.join(map(str, sizes))} is exact"), file=sys.stderr)


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
        InputError: unknown name, no weights, a checkpoint of another model or of other classes.
    """
    check_spec(spec)
    name, checkpoint = split_spec(spec)
    content = _read_checkpoint(checkpoint) if checkpoint else {}
    trained = content.get("arch")
    if isinstance(trained, str) and trained.partition(".")[0] != name.partition(".")[0]:
        raise InputError(f"{checkpoint!r} is a checkpoint of {trained!r}, not of {name!r}: use {trained}={checkpoint}")
    given = content.get("args") if isinstance(content.get("args"), argparse.Namespace) else argparse.Namespace()
    training = {key: value for key, value in vars(given).items() if value is not None}
    options = {**_model_options(training), **(model_kwargs or {})}
    classes = num_classes or (_count_classes(content, name) if checkpoint else None)
    try:
        model = timm.create_model(
            name, pretrained=not checkpoint, num_classes=classes, checkpoint_path=checkpoint or None, **options
        )
    except Exception as error:  # of timm, PyTorch, the Hub's client, pickle, zip and JSON
        raise InputError(
            f"cannot load the weights of {spec!r}: {reason(error, 2)}. {_remedy(name, checkpoint)}"
        ) from error
    own = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if not checkpoint and num_classes is not None and own is not None and own != num_classes:
        raise InputError(  # timm would replace the classifier by a random one
            f"the weights of {spec!r} have {own} classes, not {num_classes}: leave --num-classes out, or give a "
            f"file with as many, {name}=CHECKPOINT"
        )
    config = resolve_data_config(training, model=model, use_test_size=test_size)
    channels = config["input_size"][0]
    config["input_size"] = tuple(config["input_size"]) if size is None else (channels, size, size)
    config |= {key: adapt_to_chs(config[key], channels) for key in ("mean", "std")}  # as timm's loader does it
    return Loaded(spec, model.eval(), config, options)


def _model_options(training: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `create_model` in the arguments of timm's train.py that shape a model or what it computes."""
    own = {"in_chans": training["input_size"][0]} if "input_size" in training else {}
    own |= {key: training[key] for key in ("in_chans", "bn_eps") if key in training}
    return {**training.get("model_kwargs", {}), **own, **({"global_pool": training["gp"]} if "gp" in training else {})}


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
    """The spec. Raises InputError if timm does not know the name, or the checkpoint does not exist."""
    name, checkpoint = split_spec(spec)
    fault = ""
    if ":" not in name and not timm.is_model(name):  # 'hf-hub:...' is looked up when it is loaded
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=4, cutoff=0.5)
        suggestion = f": did you mean {', '.join(near)}?" if near else ""
        fault = f"unknown model {name!r}{suggestion}; python -c 'import timm; print(timm.list_models())'"
    elif name != spec and not os.path.isfile(checkpoint):
        fault = f"cannot load the weights of {spec!r}: there is no file {checkpoint!r}"
    if fault:
        raise InputError(fault)
    return spec


def _read_checkpoint(path: str) -> dict[str, Any]:
    """The entries of a checkpoint; {} for a file that timm cannot load either, whose error names the reason."""
    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of timm's train.py
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, zip, safetensors, PyTorch
        return {}
    return content if isinstance(content, dict) else {}


def _count_classes(content: dict[str, Any], name: str) -> int | None:
    """The number of classes of the classifier in a checkpoint; None if its name is unknown."""
    states = (content.get(key) for key in ("state_dict_ema", "model_ema", "state_dict", "model"))
    state = clean_state_dict(next((state for state in states if isinstance(state, dict)), content))
    cfg = None if ":" in name else get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    weight = state.get(f"{classifier[0] if isinstance(classifier, tuple) else classifier}.weight")  # distilled: two
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None


def _remedy(name: str, checkpoint: str) -> str:
    if checkpoint:
        return f"Is {checkpoint!r} a checkpoint of {name!r}, with as many classes?"
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and tags and name not in tags:
        return f"Its pretrained tags are {', '.join(tags)}."
    connect = "Pretrained weights are downloaded once: connect, set HF_ENDPOINT"
    known = connect if tags else "It has no pretrained weights"
    return f"{known}; or give a file, {name}=CHECKPOINT."


def class_titles(names: list[str]) -> list[str]:
    """Names of classes for pictures, at most 16 characters: ImageNet's first word, 'class 3' for a number."""
    titles = [f"class {name}" if name == str(index) else name.split(",")[0] for index, name in enumerate(names)]
    return [shortened(title, 16) for title in titles]


def read_class_map(path: str) -> list[str]:
    """The names of the classes in the order of their numbers: lines of a file, or sub-folders as timm numbers them."""
    if os.path.isdir(path):
        return [name for name in ImageFolder(path, "", search_split=False).class_to_idx if name]
    return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]


def find_device(name: str | None) -> torch.device:
    """The device of this name; the GPU, if there is one, if None. Raises InputError if it cannot compute."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()
    except Exception as error:  # each kind of device has its own
        raise InputError(f"--device {name} cannot be used: {reason(error)}; use cpu, or leave it out") from error
    return device
