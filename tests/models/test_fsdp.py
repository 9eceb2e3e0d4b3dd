"""Models wrapped by FSDP, by convolution, by unit and by size: inference after a training step, in two processes."""

import subprocess
import sys

import pytest

SCRIPT = """
import copy, functools, sys
import timm, torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
import equivision_timm
from equivision_timm.layers import ConvNormAct, SteerableConv2d

dist.init_process_group("gloo")
policies = {
    "convolution": ModuleWrapPolicy({SteerableConv2d, torch.nn.Conv2d}),
    "unit": ModuleWrapPolicy({ConvNormAct, timm.models.resnet.BasicBlock}),
    "size": functools.partial(size_based_auto_wrap_policy, min_num_params=500),
}
for name, policy in policies.items():
    torch.manual_seed(0)
    model, x = timm.create_model(sys.argv[1], num_classes=5), torch.rand(2, 3, 65, 65)
    alone = copy.deepcopy(model).eval()
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    with torch.no_grad():
        before = wrapped.eval()(x)
        torch.testing.assert_close(before, alone(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    wrapped.train()(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = wrapped.eval()(x)
    assert (after - before).abs().max() > 0.1, name
    torch.testing.assert_close(after, wrapped(x).detach(), rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["resnet18", "test_c8resnet"])  # the control first
def test_inference_after_a_step(name, tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
