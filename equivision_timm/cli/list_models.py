"""The models of this package, what they cost, and where their weights are: what `equivision-timm list` calls.

Parameters and multiply-accumulates are those of `checkpoints.model_card.complexity`, at the model's own image size: of
the expanded convolutions and the classifier. That runs the fused network on the meta device, which takes a second for
a deep one. Here every convolution only says the shape of its output, and of blocks that are alike one is run, so that
all models take a few.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from timm.models import resolve_pretrained_cfg
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.arguments import InputError, check_number
from equivision_timm.cli.trial import MOST_PIXELS
from equivision_timm.layers import ConvNormAct, SteerableConv2d
from equivision_timm.models import EquivariantBackbone, EquivariantViT, model_names
from equivision_timm.models.attributes import attribute
from equivision_timm.models.pretrained import PUBLISHED, WEIGHTS_FILE, local_folder
from equivision_timm.models.variants import create
from equivision_timm.weights.rooms import released

__all__ = ["Row", "as_table", "list_models"]


@dataclass(frozen=True)
class Row:
    """A model.

    Attributes:
        name: what `timm.create_model` takes.
        group: for example 'c8'.
        fields: number of regular fields of the stem.
        parameters: their number.
        gmacs: 10^9 multiply-accumulates of one image of its own size.
        size: side of that image in pixels.
        exact_sizes: the exact sizes next to the one asked for, not above and not below.
        weights: where `pretrained=True` finds them: 'package', 'local folder' or 'Hub'; else 'fetch' where that
            command gets them, or 'none'.
    """

    name: str
    group: str
    fields: int
    parameters: int
    gmacs: float
    size: int
    exact_sizes: tuple[int, int]
    weights: str


def list_models(pattern: str = "*", near: int = 224) -> list[Row]:
    """The models whose names match a shell pattern, sorted by name.

    Raises:
        InputError: no model matches, or `near` is no size of an image.
    """
    check_number("--near", near, 1, MOST_PIXELS)
    names = fnmatch.filter(model_names(), pattern)
    if not names:
        close = difflib.get_close_matches(pattern.strip("*"), model_names(), n=3)
        raise InputError(f"no model is called {pattern!r}: did you mean {', '.join(close) or 'c8*'}?")
    return [_row(name, near) for name in names]


def as_table(rows: list[Row], near: int) -> str:
    """The rows as text for people."""
    head = ("model", "group", "fields", "params (M)", "GMACs", "at", f"exact near {near}", "weights")
    cells = [
        (
            row.name,
            row.group,
            str(row.fields),
            f"{row.parameters / 1e6:.2f}",
            f"{row.gmacs:.2f}",
            str(row.size),
            ", ".join(map(str, dict.fromkeys(row.exact_sizes))),
            row.weights,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    left = (0, 1, 7)  # columns of words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *cells)
    )


def _row(name: str, near: int) -> Row:
    with _NoInitialValues():
        model = create(name, EquivariantBackbone, EquivariantViT, device="meta").eval()
    size = attribute(model, "pretrained_cfg", dict)["input_size"][-1]
    count = _count_convolutions if isinstance(model, EquivariantBackbone) else _count_blocks
    try:
        exact = model.exact_sizes(near)
    except ValueError as error:
        raise InputError(f"--near {near} is not possible for {name}: {error}") from error
    return Row(
        name=name,
        group=model.group,
        fields=model.feature_info[0]["num_fields"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=count(model, size) / 1e9,
        size=size,
        exact_sizes=exact,
        weights=_place(name),
    )


def _place(name: str) -> str:
    """Where `create_model(name, pretrained=True)` looks, in its order."""
    if resolve_pretrained_cfg(name).file:
        return "package"
    if (local_folder(name) / WEIGHTS_FILE).is_file():
        return "local folder"
    if name in PUBLISHED:
        return "Hub"
    return "fetch" if name in released() else "none"


def _count_convolutions(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image of size x size pixels; the model, on the meta device, is used up."""
    counts: list[int] = []
    for module in list(model.modules()):
        if isinstance(module, ConvNormAct):
            module.forward = _shape_alone(module.conv, counts)
        elif isinstance(module, nn.Linear):
            counts.append(module.in_features * module.out_features)
    with torch.inference_mode():
        model(torch.empty(1, attribute(model, "in_chans", int), size, size, device="meta"))
    return sum(counts)


def _count_blocks(model: nn.Module, size: int) -> float:
    """The same of a transformer: its `blocks` keep the shape of the tokens, and those alike cost the same."""
    first: dict[tuple, str] = {}
    repeats: list[str] = []
    for name, block in model.get_submodule("blocks").named_children():
        alike = first.setdefault((type(block), *(p.shape for p in block.parameters())), name)
        if alike != name:
            block.forward = lambda x: x
            repeats.append(alike)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(torch.empty(1, attribute(model, "in_chans", int), size, size, device="meta"))
    counts = counter.get_flop_counts()
    places = ["Global", *(f"{type(model).__name__}.blocks.{name}" for name in repeats)]
    return sum(sum(counts[place].values()) for place in places) / 2


def _shape_alone(conv: SteerableConv2d, counts: list[int]) -> Callable[..., torch.Tensor]:
    """A forward that appends the multiply-accumulates of the dense convolution and returns an empty output.

    O |G| H' W' outputs, each of I |G| k^2 products; H' = (H - 1) // stride + 1, as the padding keeps the size.
    """
    incoming = conv.in_fields * (conv.order if conv.input_type == "regular" else 1)
    channels = conv.out_fields * conv.order

    def forward(x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        shape = [channels, *((side - 1) // conv.stride + 1 for side in x.shape[2:])]
        counts.append(math.prod(shape) * incoming * conv.kernel_size**2)
        return torch.empty(len(x), *shape, device="meta")

    return forward


class _NoInitialValues(TorchFunctionMode):
    """Within this, parameters are made and not drawn; on the meta device they have no values anyway."""

    _DRAWING = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.fill_,
        torch.Tensor.zero_,
        torch.Tensor.mul_,
        torch.Tensor.add_,
        torch.Tensor.erfinv_,
        torch.Tensor.clamp_,
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function in self._DRAWING else function(*args, **(kwargs or {}))
