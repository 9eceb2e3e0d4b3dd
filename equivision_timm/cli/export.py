"""The command `export`: a model as an ONNX file, checked against the model itself."""

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from equivision_timm.cli.models import check_spec, load, read_class_map, short_name
from equivision_timm.cli.options import Parsers, add_class_map, add_model_kwargs, add_size
from equivision_timm.errors import one_line
from equivision_timm.files import check_writable, write_file
from equivision_timm.models import fuse

__all__ = ["export", "register"]

_TOLERANCE = 1e-3  # of the largest logit; rounding errors are a hundred times smaller


def register(commands: Parsers) -> None:
    parser = commands.add_parser(
        "export",
        help="a model as an ONNX file, checked against the model",
        description="Writes a classifier as an ONNX file of standard operators, block diagonal where that costs less: "
        "images [batch, channels, height, width] -> logits [batch, classes]. Its metadata contain the preprocessing "
        "and the names of the classes. onnxruntime must compute the logits of the model, else nothing is written.",
    )
    add = parser.add_argument
    add("model", metavar="NAME[=CHECKPOINT]", help="timm model, maybe with own weights")
    add("out", type=Path, metavar="FILE", help="ONNX file to write")
    add_model_kwargs(parser)
    add_size(parser)
    add_class_map(parser)
    parser.set_defaults(run=run, interrupted="{out} was not written")


def run(args: argparse.Namespace) -> int:
    """Write the file and print how well it agrees with the model; returns the exit status."""
    print(export(args.model, args.out, args.size, args.class_map, args.model_kwargs))
    return 0


def export(
    model: str,
    out: Path,
    size: int | None = None,
    class_map: Path | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> str:
    """Write a classifier as an ONNX file, images [batch, C, H, W] -> logits [batch, classes], for any batch size.

    Returns its size, its largest error, and what a rotation by 90 degrees (180 of a rectangle) changes, in words.

    Args:
        model: `NAME` (pretrained weights) or `NAME=CHECKPOINT`.
        out: the file.
        size: side of the images in pixels; (H, W) of the checkpoint's training, or the model's own, if None.
        class_map: names of the classes: a file with one per line, or the folder of the training images.
        model_kwargs: further keywords of `timm.create_model`.

    Raises:
        InputError: an argument cannot be used.
        RuntimeError: the file does not compute the logits of the model; it is not written.
    """
    import onnx  # noqa: F401  before the work: an extra
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    check_spec(model)
    check_writable(out, make_folders=True)
    names = None if class_map is None else read_class_map(class_map)
    loaded = load(model, size, model_kwargs=model_kwargs)
    network: Any = loaded.model
    shape = loaded.input_size
    loaded.try_image(torch.zeros(shape))
    metadata = {
        "model": short_name(model),  # without the user's folders
        "classes": json.dumps(loaded.class_names(names)),
        **{key: json.dumps(loaded.config[key]) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    }
    content = _as_onnx(fuse(network, "blocks"), shape, metadata)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(images)
    height, width = shape[1:]
    quarters = 1 if height == width else 2
    logits, rotated = _run(content, images), _run(content, images.rot90(quarters, dims=(2, 3)))
    error = _difference(logits, expected)
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"the ONNX file computes other logits than {model!r}, by {error:.1e} of the largest: not written"
        )
    write_file(out, content)
    return (
        f"{one_line(str(out))}: {len(content) / 1e6:.1f} MB, logits within {error:.0e} of the model's\n"
        f"rotated by {90 * quarters} degrees at {height} x {width} pixels they change by "
        f"{_difference(rotated, logits):.0e} of the largest"
    )


def _as_onnx(network: nn.Module, shape: tuple[int, int, int], metadata: dict[str, str]) -> bytes:
    """The file for images [batch, *shape]; its input is called 'images', its output 'logits'."""
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()  # at most 2 GB


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own messages."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _run(content: bytes, images: torch.Tensor) -> torch.Tensor:
    """The logits that onnxruntime computes on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.contiguous().numpy()})
    return torch.from_numpy(logits)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()
