"""An 8-bit network in onnxruntime with bitwise equal logits for an image in each of four orientations.

The network is fused, exported and quantised. Its convolutions then sum integers, exactly and so in any order, without
rounding errors. The mean over space must be computed from integers, too, so it becomes a GlobalAveragePool, which
onnxruntime has in 8 bits. The head after it stays in float: the quantiser would choose a scale for each element of the
group, and break the symmetry.

    pip install '.[export]'
    python scripts/examples/int8.py test_c8resnet test_c1resnet
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from explain import digits
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from equivision_timm import fuse

QUANTISED = ["Conv", "MaxPool", "Add", "Relu", "GlobalAveragePool"]


class Calibration(CalibrationDataReader):
    """Images [N, 3, H, W] for the quantiser, in batches of twenty."""

    def __init__(self, images: torch.Tensor) -> None:
        self.batches = iter(images.split(20))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch.numpy()}


def export(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write the fused model as ONNX, for any number of images of this size."""
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    plain = fuse(model.eval(), "dense")
    options = {"input_names": ["image"], "external_data": False, "verbose": False, "dynamo": True}
    torch.onnx.export(plain, (images[:2],), path, dynamic_shapes=(batch,), **options)
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type == "ReduceMean":  # over height and width, kept as axes of length 1
            pool = onnx.helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name)
            node.CopyFrom(pool)
    used = {name for node in graph.graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.graph.initializer if tensor.name not in used]:  # the axes of the mean
        graph.graph.initializer.remove(tensor)
    onnx.save(graph, path)


def quantise(path: Path, images: torch.Tensor) -> Path:
    """Write the network in 8 bits into the same folder."""
    small = path.with_name(f"{path.stem}_int8.onnx")
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    quantize_static(
        path, small, Calibration(images), QuantFormat.QDQ, op_types_to_quantize=QUANTISED, per_channel=False, **types
    )
    return small


def run(path: Path, images: torch.Tensor) -> np.ndarray:
    """Logits [N, classes] in onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images.contiguous().numpy()})[0]


def compare(name: str, folder: Path, count: int = 100) -> dict[str, float]:
    """Fraction of logits changed by rotations, in float and in 8 bits; agreement of both on the class; size of int8."""
    model = timm.create_model(name, pretrained=True)
    images, path = digits(model, count), folder / f"{name}.onnx"
    export(model, images, path)
    small = quantise(path, images)
    upright = {"float": run(path, images), "int8": run(small, images)}
    changed = {
        kind: np.mean([run(file, images.rot90(k, (-2, -1))) != upright[kind] for k in (1, 2, 3)])
        for kind, file in (("float", path), ("int8", small))
    }
    agreement = (upright["float"].argmax(1) == upright["int8"].argmax(1)).mean()
    return {**changed, "agreement": agreement, "size": small.stat().st_size / path.stat().st_size}


def main(names: list[str]) -> None:
    for name in names:
        with TemporaryDirectory() as folder:
            found = compare(name, Path(folder))
        print(
            f"{name:16} logits changed by rotations: float {found['float']:.1%}, int8 {found['int8']:.1%}; "
            f"same class in both {found['agreement']:.1%}; file {found['size']:.0%}"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["test_c8resnet", "test_c1resnet"])
