"""A model as an ONNX file, checked against the model itself: what `equivision-timm export` calls.

The file holds standard operators alone, block diagonal where that costs less (`models/fuse_blocks.py`), and says in its
metadata how images are to be prepared and what the classes are called.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from equivision_timm.arguments import InputError, check_number
from equivision_timm.cli.loading import check_model_name
from equivision_timm.cli.trained import class_names, data_config, load_trained, read_class_map
from equivision_timm.cli.trial import MOST_PIXELS, try_model
from equivision_timm.files import check_writable, write_file
from equivision_timm.models import EquivariantBackbone, EquivariantViT, fuse_blocks

__all__ = ["Exported", "export"]

_TOLERANCE = 1e-3  # of the largest logit; float noise is a hundred times smaller


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        megabytes: of the file.
        error: largest difference to the logits of the model, relative to the largest logit.
        turned: the same between the file's logits of images and of those rotated by 90 degrees.
        size: side of the images in pixels.
        exact_sizes: the nearest at which quarter turns are exact; none where `size` is one, or the model has none.
    """

    megabytes: float
    error: float
    turned: float
    size: int
    exact_sizes: tuple[int, ...]


def export(model: str, out: Path, size: int | None = None, class_map: Path | None = None) -> Exported:
    """Write a classifier as an ONNX file, images [batch, C, size, size] -> logits [batch, classes], any batch size.

    The file is run by onnxruntime on random images and must give the logits of the model, else nothing is written.

    Args:
        model: `NAME` (pretrained weights) or `NAME=CHECKPOINT`.
        out: the file.
        size: side of the images in pixels; that of the checkpoint's training, or the model's own, where None.
        class_map: names of the classes for the metadata: a file with one a line, or the folder of the training images.

    Raises:
        InputError: something given cannot be used, or the extra `export` is not installed.
        RuntimeError: the file does not compute what the model does.
        OSError: the file could not be written after all; an old one is untouched.
    """
    check_number("--size", size, 1, MOST_PIXELS)
    check_model_name(model)
    check_writable(out, make_folders=True)
    _check_installed()
    names = None if class_map is None else read_class_map(class_map)
    network, training = load_trained(model)
    config = data_config(network, training, size)
    shape = config["input_size"]
    grey = torch.zeros(shape)
    try_model(model, network, lambda: grey, shape[-1], torch.device("cpu"))
    metadata = {
        "model": model,
        "classes": json.dumps(class_names(model, network, names)),
        **{key: json.dumps(config[key]) for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    }
    content = _as_onnx(fuse_blocks(network), shape, metadata)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(images)
    logits, rotated = _run(content, images), _run(content, images.rot90(dims=(2, 3)))
    error = _difference(logits, expected)
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"the ONNX file gives other logits than {model!r}, by {error:.1e} of the largest: not written"
        )
    write_file(out, content)
    side = shape[-1]
    ours = isinstance(network, EquivariantBackbone | EquivariantViT)
    nearest = network.exact_sizes(side) if ours and not network.is_exact(side) else ()
    return Exported(len(content) / 1e6, error, _difference(rotated, logits), side, nearest)


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"ONNX files need the extra ({error}): pip install 'equivision-timm[export]'") from error


def _as_onnx(network: nn.Module, shape: tuple[int, int, int], metadata: dict[str, str]) -> bytes:
    """The file for images [batch, *shape], its input called 'images', its output 'logits'."""
    batch = torch.export.Dim("batch", min=1)
    with _silenced():
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
    try:
        return proto.SerializeToString()
    except Exception as error:  # of protobuf, of a type that depends on its version
        raise InputError(
            f"an ONNX file holds at most 2 GB, and the model has more: {error}; take a smaller one"
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what the exporter says of itself."""
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
