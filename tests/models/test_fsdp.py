"""Two processes: models wrapped by FSDP (by convolution, by unit, by size) infer after a step; DDP broadcasts."""

import pytest
from support.two_processes import run_in_two

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

torch.manual_seed(dist.get_rank())  # DDP itself has to make the two the same
model = timm.create_model(sys.argv[1], num_classes=5)
ddp = torch.nn.parallel.DistributedDataParallel(model)
statistics = {f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) for b in m._buffers}
assert statistics == {name for name, _ in model.named_buffers()}
optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
for _ in range(2):
    ddp.train()(torch.rand(2, 3, 65, 65)).square().sum().backward()  # another batch in each process
    optimizer.step()
    optimizer.zero_grad()
ddp(torch.rand(2, 3, 65, 65))  # broadcasts the statistics first, then changes them
for name, value in model.state_dict().items():
    both = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(both, value)
    own = name.endswith(("running_mean", "running_var"))  # of the last batch
    assert torch.equal(*both) is not own, name
"""


@pytest.mark.parametrize("name", ["test_resnet", "test_c8resnet"])  # the control first
def test_two_processes(name):
    run_in_two(SCRIPT, name)
