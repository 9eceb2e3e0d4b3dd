"""What `rotate-eval` and `show` try before the work starts: the device, the memory, one image through each model."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn

from equivision_timm.arguments import InputError

__all__ = ["MOST_CLASSES", "MOST_PIXELS", "check_memory", "explained", "find_device", "try_model"]

MOST_PIXELS = 8192  # sides of an image; more is a slip of the finger
MOST_CLASSES = 10**6


def find_device(name: str | None) -> torch.device:
    """The device of this name; where None, the GPU if there is one.

    Raises:
        InputError: there is no such device, or nothing can be computed on it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--device {name} cannot be used: {reason}; use cpu, or leave it out") from error
    return device


def check_memory(options: str, images: int, size: int) -> None:
    """Raises InputError where `images` images [3, size, size] alone are more than all memory of this machine."""
    needed = images * 3 * size**2 * 4
    if hasattr(os, "sysconf") and needed > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise InputError(
            f"{images} images of {size} x {size} pixels are {needed / 1e9:.0f} GB, this machine has "
            f"{memory / 1e9:.0f} GB of memory: lower {options}"
        )


@torch.inference_mode()
def try_model(
    name: str, model: nn.Module, prepare: Callable[[], torch.Tensor], size: int, device: torch.device
) -> None:
    """Send one image through the model, so that what it refuses is known before the work.

    Args:
        name: as the user gave it.
        model: on `device`.
        prepare: gives the image [C, size, size].
        size: its side in pixels.
        device: where to compute.

    Raises:
        InputError: the model does not take it, or gives no logits [1, classes], or NaN.
    """
    try:
        logits = model(prepare()[None].to(device))
    except Exception as error:  # timm's models check their input by assertions, layers by errors of any type
        if _out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name!r} does not take images of {size} x {size} pixels: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"{name!r} gives {shape} for an image, not logits of shape (1, classes): use a classifier")
    if not logits.isfinite().all():
        raise InputError(f"{name!r} gives NaN or infinity for a grey image: its weights are damaged, use others")


@contextlib.contextmanager
def explained(name: str, images: int, size: int, device: torch.device, remedy: str) -> Iterator[None]:
    """Turns too little memory into an InputError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise InputError(
            f"too little memory for {images} images of {size} x {size} pixels in {name!r} on {device}: {remedy}"
        ) from error


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())
