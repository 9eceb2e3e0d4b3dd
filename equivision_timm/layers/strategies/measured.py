"""The table of measured strategies, which `tune` writes and 'auto' reads: JSON files in the user's cache folder.

conditions    device, number of threads, versions
layers        for each layer the seconds of each strategy
models        for each tuned model its strategies by layer, and whether they won; 'auto' takes those that won
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from equivision_timm.files import cache_folder, write_file
from equivision_timm.layers.strategies import native_library
from equivision_timm.layers.strategies.contract import STRATEGIES, Layer

__all__ = ["conditions", "layer_key", "measured_choice", "read_choices", "read_table", "table_file", "update_table"]


def measured_choice(layer: Layer, shape: tuple[int, ...], training: bool, compiled: bool, threads: int) -> str | None:
    """The strategy that won for `layer` and an input of `shape`; None if there is none."""
    name = read_choices(layer.device, threads).get(layer_key(layer, shape, training, compiled))
    return name if name in STRATEGIES and STRATEGIES[name].supports(layer) is None else None


def layer_key(layer: Layer, shape: tuple[int, ...], training: bool, compiled: bool = False) -> str:
    """The name of a layer in the table: what its time depends on besides the conditions."""
    parts = [layer.kernel.name, f"{layer.in_fields}->{layer.out_fields}", f"stride {layer.stride}"]
    parts += [f"dilation {layer.dilation}", str(layer.dtype).removeprefix("torch.")]
    parts += ["x".join(map(str, shape)), "train" if training else "eval"]
    if layer.device.type != "cpu":  # where the format of a map follows from the strategy of the layer before
        parts.append("nhwc" if layer.memory_format == torch.channels_last else "nchw")
    return ", ".join(parts + ["compiled"] * compiled)


def conditions(device: torch.device) -> dict[str, Any]:
    """The conditions on which the time of every layer on `device` depends."""
    import equivision_timm

    versions = {"torch": torch.__version__, "equivision_timm": equivision_timm.__version__}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **versions}
    info = Path("/proc/cpuinfo")  # a home folder may serve several machines
    names = re.findall(r"^(?:model name|CPU part)\s*: (.*)", info.read_text(), re.M) if info.exists() else []
    place = {"device": device.type, "processor": names[:1], "threads": torch.get_num_threads()}
    return {**place, "native": native_library.describe(), **versions}


def table_file(device: torch.device) -> Path:
    """The file of the table for the present conditions."""
    digest = hashlib.sha256(json.dumps(conditions(device), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "tune" / f"{digest[:16]}.json"


def read_table(device: torch.device) -> dict[str, Any]:
    """The table for the present conditions; an empty one if there is none."""
    path = table_file(device)
    empty = {"conditions": conditions(device), "layers": {}, "models": {}}
    return json.loads(path.read_text()) if path.exists() else empty


def update_table(device: torch.device, part: str, name: str, value: dict[str, Any]) -> None:
    """Set one entry of 'layers' or 'models'; entries that other processes have written since are kept."""
    path = table_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        table = read_table(device)
        table[part][name] = value
        write_file(path, (json.dumps(table, indent=1) + "\n").encode())
    read_choices.cache_clear()


@cache
def read_choices(device: torch.device, threads: int) -> dict[str, str]:
    """The strategies of models that won, by layer."""
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        return {}  # no values, or fake ones
    try:
        models = read_table(device)["models"].values() if (cache_folder() / "tune").is_dir() else ()
    except (OSError, RuntimeError):  # no home folder, or one that this user may not read
        return {}
    return {key: name for model in models if model["won"] for key, name in model["choice"].items()}
