"""scripts/benchmark.py on a tiny network: what it compares with is dense and as wide, and it writes what it saw."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

import equivision_timm  # noqa: F401  registers the models

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # processes that measure import it by this name
    spec.loader.exec_module(module)
    return module


def test_the_dense_twin_is_plain_and_as_wide(benchmark):
    model = timm.create_model("test_c8resnet")
    twin = benchmark.dense_twin(model)
    x = torch.randn(2, 3, 65, 65)
    assert all(
        type(m).__module__.startswith(("torch", "timm")) or not list(m.parameters(recurse=False))
        for m in twin.modules()
    )
    assert {type(m) for m in twin.modules() if isinstance(m, nn.modules.conv._ConvNd)} == {nn.Conv2d}
    assert twin.forward_features(x).shape == model.forward_features(x).shape
    assert sum(p.numel() for p in twin.parameters()) > 5 * sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("mode", ["create", "eval", "train"])
def test_forms_take_turns(benchmark, mode):
    threads = torch.get_num_threads()
    seconds = benchmark.measure("test_c8resnet", mode, ["ours", "dense"], 1, 65, 2, 1)
    torch.set_num_threads(threads)
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())


def test_a_training_step_trains(benchmark):
    model = benchmark.build("dense", "test_c8resnet", "train")
    before = [p.clone() for p in model.parameters()]
    benchmark.make_step(model, "dense", "train", 2, 65)()
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) > len(before) / 2


def test_layers(benchmark):
    threads = torch.get_num_threads()
    rows = benchmark.measure_layers("test_c8resnet", 1, 65, 1, 1)
    torch.set_num_threads(threads)
    model = timm.create_model("test_c8resnet")
    assert sum(row["count"] for row in rows) == sum(
        "conv" in name for name, p in model.named_parameters() if p.ndim == 4
    )
    assert sum(row["eval share"] for row in rows) == pytest.approx(1)
    assert benchmark.layer_table(rows).count("\n") == len(rows) + 1


def test_writes_what_it_measured(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *args: function(*args))
    arguments = ["test_c8resnet", "--modes", "eval", "--eager", "--repeats", "1", "--size", "65", "--batch-size", "1"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--threads", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(
        benchmark,
        "build",
        lambda form, name, mode, build=benchmark.build: build("dense" if form == "timm" else form, name, mode),
    )
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "")
    benchmark.main()
    torch.set_num_threads(threads)
    (result,) = json.loads((tmp_path / "networks.json").read_text())["results"]
    assert result["ratio"]["dense"] == result["median"][result["best dense"]] / result["median"]["ours"]
    assert result["best dense"] == min((f for f in result["median"] if f.startswith("dense")), key=result["median"].get)
    assert f"{result['ratio']['dense']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "networks.png").stat().st_size > 5000
