"""Inference time of networks of this package and of timm's ResNets in PyTorch, onnxruntime and OpenVINO, batch size 1.

    pip install '.[export,tools]' openvino
    python scripts/deployment.py                                 # the models of the README's table, one and two threads
    python scripts/deployment.py c8resnet18 --threads 1

Forms of a network: `eager`, as `create_model` makes it; `fused`, the default of `equivision_timm.fuse`; its `dense` and
`blocks`, a plain network and a block-diagonal one, also as ONNX files in onnxruntime and OpenVINO. Each runs in its own
process; the processes alternate, as in `benchmark.py`, two steps each, of which the second is timed. With several
threads there is a pause before, because the threads of the previous process still spin. Ratios are to timm's ResNet-50
as an ONNX file in onnxruntime. Images have the size of the model's `pretrained_cfg`.

Writes deployment.json and deployment.md into --out (default: scripts/benchmarks), after each model.
"""

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from benchmark import ALLOCATOR, Runner, Setting
from report import BENCHMARKS, markdown, processor, today, write
from tqdm import tqdm

from equivision_timm import fuse
from equivision_timm.models import model_names

MODELS = ("c8resnet50", "d4resnet50", "c8resnet18", "d8resnet18", "c4resnet18", "c8resnet50_fast", "c8resnet18_fast")
MODELS += ("c8resnetaf18_fast", "d4convnext_tiny", "convnext_tiny", "resnet18")
REFERENCE = "resnet50"
FORMS = (
    "PyTorch: eager",
    "PyTorch: fused",
    "PyTorch: dense",
    "PyTorch: blocks",
    "onnxruntime: dense",
    "onnxruntime: blocks",
    "OpenVINO: dense",
    "OpenVINO: blocks",
)
PAUSE = 0.5  # seconds


def forms_of(name: str) -> list[str]:
    """The forms of a network; timm's are neither fused nor block diagonal."""
    return [form for form in FORMS if name in model_names() or not form.endswith(("fused", "blocks"))]


def image_of(name: str) -> torch.Tensor:
    """A random image [1, 3, H, W] of the model's size."""
    size = timm.get_pretrained_cfg(name).input_size
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def build(name: str, form: str) -> tuple[nn.Module, torch.Tensor]:
    """The network in PyTorch, and an image for it."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    kind = form.split(": ")[1]
    if kind != "eager":
        model = fuse(model, None if kind == "fused" else kind)
    return model, image_of(name)


def write_onnx(name: str, form: str, folder: str) -> int:
    """Write the network as an ONNX file if it does not exist; return its size in bytes."""
    path = onnx_file(name, form, folder)
    if not path.exists():
        model, image = build(name, form)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("onnxscript").setLevel(logging.ERROR)
            torch.onnx.export(model, (image,), buffer, dynamo=True, external_data=False, verbose=False)
        path.write_bytes(buffer.getvalue())
    return path.stat().st_size


def onnx_file(name: str, form: str, folder: str) -> Path:
    return Path(folder) / f"{name}-{form.split(': ')[1]}.onnx"


def prepare(name: str, form: str, folder: str, threads: int) -> Callable[[], Any]:
    """A timed step: the network on one image, in the runtime named by `form`."""
    runtime = form.split(":")[0]
    if runtime == "PyTorch":
        model, image = build(name, form)

        def step() -> None:
            with torch.inference_mode():
                model(image)

        return step
    image = image_of(name).numpy()
    path = str(onnx_file(name, form, folder))
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return partial(session.run, None, {session.get_inputs()[0].name: image})
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return partial(request.infer, [image])


def measure(name: str, threads: int, repeats: int, folder: str) -> dict[str, Any]:
    """Median seconds of every form of a network and of the reference, interleaved."""
    setting = Setting(batch_size=1, threads=threads)
    plan = {form: (name, form) for form in forms_of(name)} | {"reference": (REFERENCE, "onnxruntime: dense")}
    sizes = {form: write_onnx(*of, folder) for form, of in plan.items() if not of[1].startswith("PyTorch")}
    with ExitStack() as stack:
        runners = []
        for form, (model, own) in plan.items():
            runners.append(Runner(form, partial(prepare, model, own, folder, threads), setting))
            stack.callback(runners[-1].close)
        seconds: dict[str, list[float]] = {runner.form: [] for runner in runners}
        for _ in range(repeats):
            for runner in runners:
                time.sleep(PAUSE if threads > 1 else 0)
                runner.step()
                seconds[runner.form].append(runner.step())
    median = {form: statistics.median(values) for form, values in seconds.items()}
    reference = median.pop("reference")
    return {
        "model": name,
        "threads": threads,
        "ratio": {form: value / reference for form, value in median.items()},
        "reference": reference,
        "megabytes": {form: size / 1e6 for form, size in sizes.items() if form.startswith("onnxruntime")},
    }


def table(about: dict[str, str], results: list[dict[str, Any]]) -> str:
    lines = [
        "# Deployed on a CPU",
        "",
        "Written by `scripts/deployment.py`. One image at a time; time as a multiple of that of timm's ResNet-50 as an "
        "ONNX file in onnxruntime, interleaved measurements. Smaller is faster.",
        "",
        ", ".join(about.values()),
    ]
    for threads in dict.fromkeys(row["threads"] for row in results):
        rows = [row for row in results if row["threads"] == threads]
        cells = [
            [
                f"`{row['model']}`",
                *(f"{row['ratio'][form]:.2f}" if form in row["ratio"] else None for form in FORMS),
                *(
                    f"{row['megabytes'][form]:.0f}" if form in row["megabytes"] else None
                    for form in ("onnxruntime: dense", "onnxruntime: blocks")
                ),
            ]
            for row in rows
        ]
        reference = 1e3 * statistics.median(row["reference"] for row in rows)
        columns = ["model", *FORMS, "ONNX file, MB: dense", "blocks"]
        lines += ["", f"## {threads} thread{'s' * (threads > 1)} (1.00 is {reference:.0f} ms)", ""]
        lines.append(markdown(columns, cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="timm models (default: README's)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each form (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=BENCHMARKS)
    args = parser.parse_args()
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f"unknown models of timm: {', '.join(unknown)}")
    os.environ.update(ALLOCATOR)
    about = {
        **today("torch", "timm", "onnxruntime", "openvino"),
        "machine": processor(),
        "images": "one image of the model's size (225 or 224 pixels a side), float32",
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads:
            for name in (progress := tqdm(args.models)):
                progress.set_description(f"{name}, threads {threads}")
                results.append(measure(name, threads, args.repeats, folder))
                write(args.out / "deployment", {**about, "results": results}, table(about, results))
    print(table(about, results))


if __name__ == "__main__":
    main()
