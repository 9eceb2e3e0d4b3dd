"""scripts/benchmark.py on a tiny network: its rival is dense and as wide, and it writes the measured figures."""

import json
import sys
import timeit
from functools import partial

import benchmark
import pytest
import timm
import torch
import torch.nn as nn
from support.fresh_process import context

from equivision_timm import SteerableConv2d


def test_the_dense_network_is_plain_and_as_wide():
    setting, x = benchmark.Setting(1, 65), torch.randn(2, 3, 65, 65)
    ours, dense, folded = (
        benchmark.build(form, "test_c8resnet", mode, setting)
        for form, mode in (("ours", "train"), ("dense", "train"), ("dense folded", "eval"))
    )

    def kinds(model):
        return {type(module) for module in model.modules() if list(module.parameters(recurse=False))}

    assert kinds(dense) == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert kinds(folded) == {nn.Conv2d, nn.Linear}
    assert dense.forward_features(x).shape == ours.forward_features(x).shape
    assert sum(p.numel() for p in dense.parameters()) > 5 * sum(p.numel() for p in ours.parameters())
    assert all(p.requires_grad for p in dense.parameters())
    fused = benchmark.build("ours", "test_c8resnet", "eval", setting)  # inference is measured fused
    assert SteerableConv2d in kinds(ours) - kinds(fused)


def test_forms_take_turns(monkeypatch):
    """Each in its own process; one that ends raises an error."""
    monkeypatch.setattr(benchmark, "get_context", lambda _: context)  # forks of a process that has PyTorch loaded
    taken = []
    step = benchmark.Runner.step
    monkeypatch.setattr(benchmark.Runner, "step", lambda self: taken.append(self.form) or step(self))
    setting = benchmark.Setting(1, 65)
    prepare = partial(benchmark.prepare_step, name="test_c8resnet", mode="train", setting=setting)
    seconds, memory = benchmark.in_turns({form: partial(prepare, form) for form in ("ours", "dense")}, 2, setting)
    assert taken == ["ours", "dense"] * 2
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
    assert all(1 < memory[form] < 2000 for form in ("ours", "dense"))  # MB
    with pytest.raises(RuntimeError, match="--batch-size"):
        benchmark.in_turns({"ours": partial(prepare, "ours", name="no_such_model")}, 1, setting)


def test_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    def in_turns(steps, repeats, setting):
        """In this process, the dense network as timm's."""
        seconds = {}
        for form, prepare in steps.items():
            _, name, mode, _ = prepare.args
            model = benchmark.build("dense" if form == "timm" else form, name, mode, setting)
            step = benchmark.make_step(model, form, mode, setting)
            seconds[form] = [timeit.timeit(step, number=1) for _ in range(repeats)]
        return seconds, dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(benchmark, "in_turns", in_turns)
    arguments = ["test_c8resnet", "--modes", "eval", "--eager", "--repeats", "1", "--size", "65", "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--out", str(tmp_path)])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "")
    benchmark.main()
    (result,) = json.loads((tmp_path / "networks.json").read_text())["results"]
    forms = result["dense forms, alone"]
    assert len(forms) == 4
    assert result["best dense"] == min(forms, key=forms.get)
    assert result["ratio"]["dense"] == result["median"][result["best dense"]] / result["median"]["ours"]
    assert f"{result['ratio']['dense']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "networks.png").stat().st_size > 5000


def test_the_rival_in_timm():
    rivals = {
        "c8resnet50": "resnet50",
        "c8resnetaf50": "resnet50",
        "c8resnetaa50d": "resnetaa50d",
        "c8reresnet101": "resnet101",
        "d4vit_base_patch16_full_224": "vit_base_patch16_224",
        "d4hybridvit_huge_patch14_224": "vit_huge_patch14_224",
        "d4convnextv2_tiny": "convnextv2_tiny",
    }
    assert {name: benchmark.timms_rival(name) for name in rivals} == rivals
    assert all(map(timm.is_model, rivals.values()))
