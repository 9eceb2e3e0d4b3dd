"""The foreign checkpoints that models of ours are made from: which there are, which room reads them.

Nothing but this file knows more than one room; a new format is a folder beside it and a line in `released`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from equivision_timm.arguments import InputError
from equivision_timm.images.photographs import find_photographs
from equivision_timm.models import EquivariantResNet, family_of, model_names
from equivision_timm.weights.equivision import convert_file as equivision
from equivision_timm.weights.equivision.sign_groups import parse_signs
from equivision_timm.weights.octic import convert_file as octic
from equivision_timm.weights.octic.read_file import read_octic
from equivision_timm.weights.read_file import read_checkpoint
from equivision_timm.weights.redet import convert_file as redet
from equivision_timm.weights.released import Released, released_in

__all__ = ["Released", "check_file", "check_options", "convert_file", "released"]


def released() -> dict[str, Released]:
    """All released checkpoints by the name of the model."""
    return {name: entry for room in ("equivision", "redet", "octic") for name, entry in released_in(room).items()}


def convert_file(
    checkpoint: Path, model_name: str, folder: Path, images: Path | None = None, signs: str | None = None
) -> Any:
    """Convert a foreign checkpoint into a model folder; returns a report to print. See the rooms' own functions.

    Args:
        checkpoint: the file.
        model_name: the model that it is for.
        folder: the model folder to write.
        images: photographs, for statistics and signs of equivision's checkpoints.
        signs: the sign pattern of equivision's D4 and D8 checkpoints, where it is known.

    Raises:
        InputError: there is no room for checkpoints of this model, or it takes neither photographs nor signs.
    """
    return _converter(model_name, images, signs)(checkpoint, model_name, folder)


def check_file(checkpoint: Path, model_name: str) -> None:
    """Find out whether a file is a sound checkpoint of the room that reads those of this model.

    Raises:
        ValueError: it is none.
    """
    read = read_octic if model_name in released_in("octic") else read_checkpoint
    read(checkpoint)


def check_options(model_name: str, images: Path | None, signs: str | None) -> None:
    """Find out before a download whether `convert_file` can take these.

    Raises:
        InputError: see `convert_file`; there are no photographs in `images`.
        ValueError: no such signs.
    """
    _converter(model_name, images, signs)
    if signs is not None:
        parse_signs(model_name.partition("resnet")[0], signs)
    if images is not None:
        find_photographs(images)


def _converter(model_name: str, images: Path | None, signs: str | None) -> Callable[[Path, str, Path], Any]:
    if model_name not in model_names():
        raise InputError(f"{model_name!r} is no model of this package, e.g. c8resnet50")
    if "reresnet" not in model_name and issubclass(family_of(model_name), EquivariantResNet):
        return partial(equivision.convert_file, images=images, signs=signs)
    if images is not None or signs is not None:
        option = "--images" if images is not None else "--signs"
        raise InputError(f"{option} is for checkpoints of equivision, and {model_name} has none: leave it out")
    if model_name in released_in("redet"):
        return redet.convert_file
    if model_name in released_in("octic"):
        return octic.convert_file
    raise InputError(f"there are no checkpoints of {model_name} to convert")
