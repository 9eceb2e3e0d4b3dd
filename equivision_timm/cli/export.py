"""The command `export`: a model as an ONNX file, checked against the model itself."""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from equivision_timm.cli.models import Loaded, load, short_name
from equivision_timm.cli.options import Parsers, add_command, add_model, add_options
from equivision_timm.errors import one_line
from equivision_timm.files import check_writable, write_file
from equivision_timm.models import fuse

__all__ = ["register"]

_TOLERANCE = 1e-3  # of the largest logit; rounding errors are a hundred times smaller


def register(commands: Parsers) -> None:
    text = "write a classifier as an ONNX file, checked against the model"
    more = """The file consists of standard operators, block diagonal where that costs less: images [batch,
        channels, height, width] -> logits [batch, classes]. Its metadata are plain strings: description, model,
        group, exact, color, scale, mean, std, resize, crop, output, softmax and classes, one per line.
        onnxruntime must compute the logits of the model, otherwise nothing is written."""
    parser = add_command(commands, "export", run, text, more)
    add_model(parser, option=False)
    parser.add_argument("out", type=Path, metavar="FILE", help="ONNX file to write")
    add_options(parser, "size", "class-map")


def run(args: argparse.Namespace) -> int:
    """Write the file; print its size, its largest error, and what a rotation changes. Returns the exit status."""
    import onnx  # noqa: F401  before the work: an extra
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    check_writable(args.out)
    loaded = load(args.model, args.size, model_kwargs=args.model_kwargs)
    network, (channels, height, width) = loaded.model, loaded.input_size
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    content = _as_onnx(fuse(network, "blocks"), images, _metadata(loaded, loaded.class_names(args.class_map)))
    with torch.inference_mode():
        expected = network(images)
    quarters = 1 if height == width else 2
    logits, rotated = _run(content, images), _run(content, images.rot90(quarters, dims=(2, 3)))
    error, change = _difference(logits, expected), _difference(rotated, logits)
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"the ONNX file computes other logits than {args.model!r}, by {error:.1e} of the largest: not written"
        )
    write_file(args.out, content)
    print(f"{one_line(str(args.out))}: {len(content) / 1e6:.1f} MB, logits within {error:.0e} of the model's")
    angle = f"{90 * quarters} degrees at {height} x {width} pixels"
    print(f"rotated by {angle} they change by {change:.0e} of the largest")
    return 0


def _metadata(loaded: Loaded, classes: list[str]) -> dict[str, str]:
    """Plain strings that describe the file; numbers are separated by spaces, classes by line breaks."""
    network: Any = loaded.model
    config, (channels, height, width) = loaded.config, loaded.input_size
    color = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    covered = [int(side / config["crop_pct"]) for side in (height, width)]
    rule = {
        "squash": "aspect ratio not kept, to exactly {} x {} pixels",
        "border": "aspect ratio kept, to the largest size inside {} x {} pixels, the rest filled with the mean",
    }.get(config["crop_mode"], "aspect ratio kept, to the smallest size that covers {} x {} pixels")
    name, group = short_name(loaded.spec), getattr(network, "group", "none")
    exact = network.is_exact((height, width)) if hasattr(network, "is_exact") else None
    symmetry = "" if group == "none" else f", equivariant under the group {group}"
    return {
        "description": f"Image classifier {name}{symmetry}. Input: images [batch, {channels}, {height}, {width}], "
        f"{color}, resized and cropped as below, then (pixel * scale - mean) / std for pixels from 0 to 255. Output: "
        f"logits [batch, {len(classes)}], whose softmax are the probabilities of the classes.",
        "model": name,
        "group": group,
        "exact": {True: "yes", False: "no", None: "none"}[exact],
        "color": color,
        "scale": repr(1 / 255),
        **{key: " ".join(f"{value:.9g}" for value in config[key]) for key in ("mean", "std")},
        "resize": f"{config['interpolation']} with antialiasing, {rule.format(*covered)}",
        "resize_height": str(covered[0]),
        "resize_width": str(covered[1]),
        "crop": f"{height} x {width} pixels from the centre",
        "height": str(height),
        "width": str(width),
        "output": "logits",
        "softmax": "no",
        "classes": "\n".join(map(one_line, classes)),
    }


def _as_onnx(network: nn.Module, images: torch.Tensor, metadata: dict[str, str]) -> bytes:
    """The file for any number of such images; its input is called 'images', its output 'logits'."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program: Any = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    proto.doc_string = metadata["description"]
    return proto.SerializeToString()  # at most 2 GB


def _run(content: bytes, images: torch.Tensor) -> torch.Tensor:
    """The logits that onnxruntime computes on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.contiguous().numpy()})
    return torch.from_numpy(logits)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()
