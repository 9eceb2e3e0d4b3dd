"""Adapted models under autocast, torch.compile, ONNX, checkpointing and DDP; the backbone is the control throughout."""

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from support.results import onnx_function
from support.two_processes import run_in_two

from equivision_timm.models import Canonicalized, Symmetrized

X = F.interpolate(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), (64, 64), mode="bicubic")
LABELS = torch.tensor([1, 3])
KINDS = ["all", "one", "hard", "soft"]


def create(kind, name="test_resnet", **options):
    """Symmetrized with all views or one view in training, Canonicalized with a hard or soft choice; 5 classes."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=5, **options)
    if kind in ("all", "one"):
        return Symmetrized(backbone, "d2", train_views=int(kind == "one"), chunk=2)
    if kind == "hard":
        return Canonicalized(backbone, orientation="c4orient_tiny")
    scores = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(48, 4))
    scores.group, scores.num_classes = "c4", 4
    return Canonicalized(backbone, group_pool="prob", orientation=scores, choice="soft", chunk=0)


def gradients(model, x=X, **autocast):
    model.zero_grad()
    torch.manual_seed(1)  # of the views that train_views=1 draws
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        loss = F.cross_entropy(model(x).float(), LABELS)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    model = create(kind)
    full, half = gradients(model), gradients(model, dtype=torch.bfloat16)
    assert F.cosine_similarity(full, half, dim=0) > 0.9
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(X)
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        for found in (model(X), model.bfloat16()(X.bfloat16()), model(X.bfloat16().rot90(2, (-2, -1)))):
            torch.testing.assert_close(found.float(), logits.float(), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inside
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_forward_and_backward(kind):
    torch.compiler.reset()
    model = create(kind).double().train(kind != "hard")
    for module in model.modules():  # two images at 64 pixels: the statistics of the last stage are noise
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if kind != "one":  # whose random numbers differ
        torch.testing.assert_close(gradients(compiled, X.double()), gradients(model, X.double()))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="its ONNX exporter cannot write these graphs")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # inside
@pytest.mark.parametrize("kind", ["all", "hard", "soft"])
def test_onnx(kind, tmp_path):
    model, batch = create(kind).eval(), {0: torch.export.Dim("batch", min=1, max=16)}
    exported = onnx_function(tmp_path, model, X, dynamo=True, dynamic_shapes=(batch,))
    images = torch.cat([X, X.rot90(1, (-2, -1)), X.flip(-1)])
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("all", "test_vit"), ("one", "test_resnet"), ("soft", "test_vit")])
def test_gradient_checkpointing_changes_no_gradient(kind, name):
    model = create(kind, name, **({"img_size": 64} if name == "test_vit" else {})).train()
    before = gradients(model)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    torch.testing.assert_close(gradients(model), before)


DDP = """
import timm, torch
import torch.distributed as dist
import equivision_timm

dist.init_process_group("gloo")
for name, options in [
    ("symmetrized", {"train_views": 1}),
    ("canonicalized", {}),
    ("canonicalized", {"choice": "soft", "group_pool": "prob"}),
]:
    torch.manual_seed(dist.get_rank())  # DDP itself has to make the two the same
    model = timm.create_model(name, backbone="test_resnet", group="c4", num_classes=5, **options)
    ddp = torch.nn.parallel.DistributedDataParallel(model)  # which raises if a parameter has no gradient
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(ddp.train()(torch.rand(2, 3, 33, 33)), torch.tensor([0, 1]))
        loss.backward()  # another batch in each process
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.detach())
        assert torch.equal(*both), name
        assert not torch.equal(value, before[name]), name
"""


def test_two_processes():
    run_in_two(DDP, "")
