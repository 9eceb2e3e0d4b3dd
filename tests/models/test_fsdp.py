"""Two processes: models wrapped by FSDP (by convolution, by unit) infer after a step; DDP broadcasts."""

from support.two_processes import run_in_two

SCRIPT = """
import copy, sys
import timm, torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
import equivision_timm
from equivision_timm.layers import ConvNormAct, SteerableConv2d

dist.init_process_group("gloo")
x = torch.rand(2, 3, 33, 33)
for name, kinds in (
    ("test_resnet", {timm.models.resnet.BasicBlock}),  # the control first
    (sys.argv[1], {SteerableConv2d}),
    (sys.argv[1], {ConvNormAct}),
):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    alone = copy.deepcopy(model).eval()
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(kinds), device_id=torch.device("cpu")
    )
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
    ddp.train()(torch.rand(2, 3, 33, 33)).square().sum().backward()  # another batch in each process
    optimizer.step()
    optimizer.zero_grad()
ddp(torch.rand(2, 3, 33, 33))  # broadcasts the statistics first, then changes them
for name, value in model.state_dict().items():
    both = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(both, value)
    own = name.endswith(("running_mean", "running_var"))  # of the last batch
    assert torch.equal(*both) is not own, name
"""


def test_two_processes():
    run_in_two(SCRIPT, "test_c8resnet")
