"""A model as its checkpoint was trained, and the names of its classes.

A checkpoint that timm's `train.py` wrote says how the model was made and how its images were prepared. What it cannot
say is the names of the classes: they come from a class map, from the model's own config, or, for the numbers of classes
of ImageNet, from there.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import clean_state_dict, get_pretrained_cfg

from equivision_timm.arguments import InputError
from equivision_timm.cli.loading import load_model, split_spec
from equivision_timm.images.pictures import ENDINGS
from equivision_timm.models.attributes import attribute

__all__ = ["class_names", "data_config", "load_trained", "read_class_map"]


def load_trained(spec: str, num_classes: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments of the training that wrote its checkpoint; {} where nothing is known of it.

    Args:
        spec: `NAME` or `NAME=CHECKPOINT`.
        num_classes: classes of the classifier; those that the checkpoint shows, or the model's own, where None.

    Raises:
        InputError: a checkpoint of another model, or what `load_model` refuses.
    """
    name, checkpoint = split_spec(spec)
    if not checkpoint:
        return load_model(spec, num_classes), {}
    content = _open_checkpoint(checkpoint)
    architecture, trained = name.partition(".")[0], content.get("arch")
    if isinstance(trained, str) and trained.partition(".")[0] != architecture:
        raise InputError(f"{checkpoint!r} is a checkpoint of {trained!r}, not of {name!r}: use {trained}={checkpoint}")
    arguments = content.get("args")
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    training = {key: value for key, value in given.items() if value is not None}
    # what train.py hands to create_model, as far as it shapes the entries or what they compute
    options = {**training.get("model_kwargs", {}), **{k: training[k] for k in ("in_chans", "bn_eps") if k in training}}
    if "in_chans" not in training and "input_size" in training:
        options["in_chans"] = training["input_size"][0]
    if "gp" in training:
        options["global_pool"] = training["gp"]
    return load_model(spec, num_classes or _classes_of(content, name), **options), training


def data_config(model: nn.Module, training: dict[str, Any], size: int | None) -> dict[str, Any]:
    """How to prepare images: as in the training of `load_trained`, else as the model says; `size` None: as there."""
    config = resolve_data_config(training, model=model)
    if size is not None:
        config["input_size"] = (config["input_size"][0], size, size)
    return config


def _open_checkpoint(path: str) -> dict[str, Any]:
    """What a checkpoint file holds; {} for a file that `load_model` will have to explain."""
    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of timm's train.py
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, zip, safetensors, PyTorch: any file can be at fault
        return {}
    return content if isinstance(content, dict) else {}


def _classes_of(content: dict[str, Any], name: str) -> int | None:
    """The number of classes that the classifier in a checkpoint tells apart; None where it shows none."""
    states = (content.get(key) for key in ("state_dict_ema", "model_ema", "state_dict", "model"))
    state = clean_state_dict(next((state for state in states if isinstance(state, dict)), content))
    cfg = None if ":" in name else get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None  # two, of which the first counts, where a model was distilled
    weight = state.get(f"{classifier[0] if isinstance(classifier, tuple) else classifier}.weight")
    return weight.shape[0] if isinstance(weight, torch.Tensor) else None


def class_names(spec: str, model: nn.Module, given: list[str] | None) -> list[str]:
    """The names of all classes: those given, the model's own, ImageNet's, else their numbers.

    A model's own names are those of its pretrained weights, and say nothing of a checkpoint.
    """
    count = attribute(model, "num_classes", int)
    if given is not None:
        if len(given) != count:
            raise InputError(f"--class-map has {len(given)} names, and {spec!r} tells {count} classes apart: name each")
        return given
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if not split_spec(spec)[1] and isinstance(own, list | tuple) and len(own) == count:
        return [str(name) for name in own]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return [str(index) for index in range(count)]


def read_class_map(path: Path) -> list[str]:
    """The names of the classes, in the order of their numbers: that of timm's training for a folder."""
    if path.is_dir():
        classes = find_images_and_targets(str(path), types=ENDINGS)[1]
        names = sorted(filter(None, classes), key=classes.__getitem__)
        if not names:
            raise InputError(f"--class-map {path}: no sub-folders of images in it; name a file, or another folder")
        return names
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(
            f"--class-map {path} cannot be read: {reason}; give a text file with the name of one class a line"
        ) from error
    names = [name.strip() for name in names]
    if "" in names:
        raise InputError(f"--class-map {path}: line {names.index('') + 1} is empty; give one class a line")
    return names
