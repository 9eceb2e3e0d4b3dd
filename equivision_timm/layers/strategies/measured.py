"""Which strategy was measured as the fastest for a layer on this machine: the table that `tune` writes, 'auto' reads.

A file holds what was measured under the same conditions (`conditions`): one device, one number of threads, one version
of PyTorch and of this package. It lies in the user's cache folder, as readable JSON:

    conditions    what all times depend on
    layers        for each layer the seconds of each strategy
    models        for each tuned model whether its choice of strategies won as a whole, and that choice by layer

'auto' takes the choices of models that won. Other conditions, a file that is damaged, or a layer that is not there
leave it as it is without a table.
"""

import hashlib
import json
import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.fx.experimental.symbolic_shapes import has_static_value

from equivision_timm.files import cache_folder, write_file
from equivision_timm.layers.strategies import native_library
from equivision_timm.layers.strategies.basis import named_kernel
from equivision_timm.layers.strategies.contract import STRATEGIES, Layer

__all__ = [
    "conditions",
    "layer_key",
    "measured_choice",
    "read_table",
    "table_file",
    "update_table",
]


def measured_choice(layer: Layer, shape: tuple[int, ...], training: bool) -> str | None:
    """The strategy that won for `layer` and an input of `shape`, with gradients or without; None where none did.

    In torch.compile, where a model has choices of its own: None where the graph leaves the shape open.
    """
    if not torch.compiler.is_compiling():
        return _choice(layer, tuple(shape), training, compiled=False)
    if not all([has_static_value(length) for length in shape]):  # a list, which torch.compile can read
        return None
    fields = (layer.kernel.name, layer.in_fields, layer.out_fields, layer.stride, layer.dilation)
    return _choice_for_graph(*fields, layer.dtype, layer.device, layer.memory_format, shape, training)


def _choice(layer: Layer, shape: tuple[int, ...], training: bool, compiled: bool) -> str | None:
    choices = _choices(layer.device, torch.get_num_threads())
    if not choices:
        return None
    name = choices.get(layer_key(layer, shape, training, compiled))
    return name if name in STRATEGIES and STRATEGIES[name].supports(layer) is None else None


@torch.compiler.assume_constant_result  # torch.compile calls it, with plain values alone
def _choice_for_graph(
    kernel: str,
    in_fields: int,
    out_fields: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format,
    shape: tuple[int, ...],
    training: bool,
) -> str | None:
    layer = Layer(named_kernel(kernel), in_fields, out_fields, stride, dilation, dtype, device, memory_format)
    return _choice(layer, tuple(shape), training, compiled=True)


def layer_key(layer: Layer, shape: tuple[int, ...], training: bool, compiled: bool = False) -> str:
    """The name of a layer in the table: what its time depends on besides the conditions.

    On the CPU a strategy takes maps as they come and leaves them as it likes, so the format of a layer's input follows
    from the choices for the layers before it, and has no part in the name.
    """
    memory_format = "nhwc" if layer.memory_format == torch.channels_last else "nchw"
    memory_format = "any format" if layer.device.type == "cpu" else memory_format
    parts = (
        layer.kernel.name,
        f"{layer.in_fields}->{layer.out_fields}",
        f"stride {layer.stride}",
        f"dilation {layer.dilation}",
        str(layer.dtype).removeprefix("torch."),
        memory_format,
        "x".join(map(str, shape)),
        "train" if training else "eval",
        *(["compiled"] if compiled else []),
    )
    return ", ".join(parts)


def conditions(device: torch.device) -> dict[str, Any]:
    """What the time of every layer on `device` depends on."""
    import equivision_timm

    if device.type == "cuda":
        place = {"device": torch.cuda.get_device_name(device), "capability": torch.cuda.get_device_capability(device)}
    else:
        place = {"device": device.type, "processor": _processor()}
        place |= {"threads": torch.get_num_threads(), "native": native_library.describe()}
    versions = {"torch": torch.__version__, "equivision_timm": equivision_timm.__version__}
    return json.loads(json.dumps({**place, **versions}))  # tuples as lists, as in the file


def _processor() -> str:
    """Its name: a home folder may serve several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor()


def table_file(device: torch.device) -> Path:
    """Where the table for the present conditions lies, or would."""
    digest = hashlib.sha256(json.dumps(conditions(device), sort_keys=True).encode()).hexdigest()
    return _folder() / f"{digest[:16]}.json"


def _folder() -> Path:
    return cache_folder() / "tune"


def read_table(device: torch.device) -> dict[str, Any]:
    """The table for the present conditions; an empty one where there is none, or, with a warning, a damaged one."""
    empty = {"conditions": conditions(device), "layers": {}, "models": {}}
    path = table_file(device)
    try:
        table = json.loads(path.read_text())
        whole = (
            table["conditions"] == empty["conditions"]
            and all(isinstance(seconds, dict) for seconds in table["layers"].values())
            and all(isinstance(model["choice"], dict) and "won" in model for model in table["models"].values())
        )
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _ignored(path, f"{type(error).__name__}: {error}", empty)
    return table if whole else _ignored(path, "it is for other conditions, or not a table", empty)


def _ignored(path: Path, reason: str, empty: dict[str, Any]) -> dict[str, Any]:
    warnings.warn(f"{path} is ignored ({reason}): run `tune` again, or remove it", RuntimeWarning, stacklevel=3)
    return empty


def update_table(device: torch.device, part: str, name: str, value: dict[str, Any]) -> None:
    """Set one entry of 'layers' or 'models'; entries that other processes have written meanwhile stay.

    Raises:
        OSError: the file cannot be written; an old one is unchanged.
    """
    path = table_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        table = read_table(device)
        table[part][name] = value
        write_file(path, (json.dumps(table, indent=1) + "\n").encode())
    _choices.cache_clear()


@cache
def _choices(device: torch.device, threads: int) -> dict[str, str]:
    """All choices of models that won, by layer; read once in a process."""
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        return {}  # no values, or fake ones
    try:
        if not _folder().is_dir():
            return {}  # nothing was tuned
    except OSError:  # no home folder, or one that this user may not look into
        return {}
    models = read_table(device)["models"].values()
    return {key: name for model in models if model["won"] for key, name in model["choice"].items()}
