"""Norms, attention and pooling of fields; batch norm by channel against the definition in float64."""

import copy

import pytest
import torch
import torch.nn as nn
from support.cases import GROUPS
from timm.layers import BatchNormAct2d, SEModule

from equivision_timm.groups import Group
from equivision_timm.layers import FieldAttention, GroupPool
from equivision_timm.layers.norm import FieldBatchNorm2d, FieldNorm, field_batch_norm, field_batch_norm_by_definition
from equivision_timm.testing import assert_equivariant

REGULAR = {"input_type": "regular", "output_type": "regular", "tolerance": 1e-5}
POOLED = {"input_type": "regular", "output_type": "trivial", "tolerance": 1e-6}
ATTENTION = {"group": "d4", "in_channels": 64, "size": 9, **REGULAR}
LAST = torch.channels_last
FIELDS = 5


def field_norm(order: int, dtype: torch.dtype = torch.float64, **kwargs) -> FieldNorm:
    torch.manual_seed(0)
    norm = FieldNorm(FIELDS, order, lambda fields, **dd: nn.BatchNorm2d(fields, **kwargs, **dd)).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def definition(norm: FieldNorm, x: torch.Tensor) -> torch.Tensor:
    """`nn.BatchNorm2d` on [B, m, |G| * H, W]."""
    b, c, h, w = x.shape
    return norm.per_field(x.contiguous().view(b, norm.fields, norm.order * h, w)).view(b, c, h, w)


def maps(order: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, FIELDS * order, 4, 3, dtype=dtype) * 2 + 30  # far from zero: no digits may be lost


def results(norm: FieldNorm, apply, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = apply(norm, x)
    gradients = torch.autograd.grad(y, [x, *norm.parameters()], dy)
    return {"y": y, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=False)), **dict(norm.named_buffers())}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False])
def test_is_the_batch_norm_of_fields(kwargs, train):
    norm = field_norm(8, **kwargs).train(train)
    assert type(norm.per_field) is FieldBatchNorm2d
    plain = copy.deepcopy(norm)
    plain.per_field.__class__ = nn.BatchNorm2d
    for _ in range(3):  # running statistics add up
        x, dy = maps(8), maps(8) - 30
        expected = results(plain, definition, x, dy)
        found = results(norm, FieldNorm.__call__, x.contiguous(memory_format=LAST), dy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=name)
    assert found["y"].is_contiguous(memory_format=LAST)
    assert found["dx"].is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("by_channel", [field_batch_norm, field_batch_norm_by_definition])
def test_first_and_second_derivatives(by_channel):
    norm = field_norm(2)
    x = maps(2, batch=2)[:, :, :2, :2].flatten(2).requires_grad_()  # [N, m * |G|, L]
    inputs = (x, norm.per_field.weight, norm.per_field.bias)

    def function(x, weight, bias):
        return by_channel(x, 2, weight, bias, 1e-5)[0]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Statistics of half types are sums in float32, as those of `nn.BatchNorm2d`."""
    norm = field_norm(8, torch.float32)
    x = maps(8).to(dtype)
    exact = definition(copy.deepcopy(norm).double(), x.double())  # contiguous: by PyTorch's own
    y = norm(x.contiguous(memory_format=LAST))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * exact.abs().max().item())
    mean = x.double().view(len(x), FIELDS, -1).mean((0, 2))
    torch.testing.assert_close(norm.per_field.running_mean.double() / 0.1, mean, rtol=1e-5, atol=0)


def test_constant_fields_and_single_values():
    norm, bias = field_norm(8), field_norm(8).per_field.bias.repeat_interleave(8).view(1, -1, 1, 1)
    y = norm(torch.full((2, FIELDS * 8, 3, 3), 7.0, dtype=torch.float64).contiguous(memory_format=LAST))
    torch.testing.assert_close(y, bias.expand_as(y))
    assert (norm.per_field.running_var - 0.9).abs().max() < 1e-12
    for memory_format in (torch.contiguous_format, LAST):
        with pytest.raises(ValueError, match="more"):
            field_norm(1)(torch.ones(1, FIELDS, 1, 1, dtype=torch.float64).contiguous(memory_format=memory_format))


def test_other_norms_keep_the_memory_format():
    x = maps(8, torch.float32).contiguous(memory_format=LAST)
    norm = FieldNorm(FIELDS, 8, lambda fields, **dd: nn.GroupNorm(1, fields, **dd))
    y = norm(x)
    assert y.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(y, norm(x.contiguous()))
    assert norm(x.contiguous()).is_contiguous()


def test_hooks_and_replaced_batch_norms():
    """`per_field` is called in every format, and other batch norms see the same fields."""
    x = maps(8, torch.float32)
    norm, calls = field_norm(8, torch.float32), []
    handle = norm.per_field.register_forward_hook(lambda module, args, y: calls.append(y.numel()))
    expected = norm(x)
    torch.testing.assert_close(norm(x.contiguous(memory_format=LAST)), expected)
    handle.remove()
    assert calls == [x.numel()] * 2
    activated = FieldNorm(FIELDS, 8, lambda fields, **dd: BatchNormAct2d(fields, **dd))
    assert (activated(x.contiguous(memory_format=LAST)) >= 0).all()
    torch.testing.assert_close(activated(x.contiguous(memory_format=LAST)), activated(x))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm)).eval()
    assert type(synchronised.per_field) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronised(x.contiguous(memory_format=LAST)), norm.eval()(x))


def random_norm(fields, order):
    norm = FieldNorm(fields, order)
    for value in norm.per_field.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("group", GROUPS)
def test_equivariant(group):
    order = Group.from_name(group).order
    assert_equivariant(random_norm(3, order), 9, group=group, in_channels=3 * order, **REGULAR)
    for pool_type in ("max", "avg"):
        assert_equivariant(GroupPool(order, pool_type), 9, group=group, in_channels=3 * order, **POOLED)


def test_wrong_channels_are_rejected():
    shuffled = nn.Sequential(nn.ChannelShuffle(4), GroupPool(4))
    for wrong, kind in ((random_norm(12, 1), REGULAR), (shuffled, POOLED)):  # the norm has statistics by channel
        with pytest.raises(AssertionError, match="c4"):
            assert_equivariant(wrong, 9, group="c4", in_channels=12, **kind)


def test_pool_values():
    x = torch.tensor([[1.0, 5.0, 2.0, -1.0]])
    assert GroupPool(2)(x).tolist() == [[5, 2]]
    assert GroupPool(2, "avg")(x).tolist() == [[3, 0.5]]
    assert GroupPool(2, "")(x) is x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_is_overwritten_without_copies(memory_format):
    """It is not a view, whose gradient would be copied; the control is a view of it."""
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    norm = random_norm(2, 4)
    y = norm(x).relu_()
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    assert [norm(image).stride() for image in (x, x[:1], x[:1].detach())] == [t.stride() for t in (x, x[:1], x[:1])]
    assert type(norm(x).permute(0, 1, 3, 2).relu_().grad_fn).__name__ != "ReluBackward0"
    expected = torch.autograd.grad(norm(x).relu().square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), expected)


# Attention


def stirred(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("name", ["se", "ese", "eca", "gc"])
def test_equivariant_where_plain_channels_are_not(name):
    layer = stirred(FieldAttention(8, 8, name))
    assert_equivariant(layer, **ATTENTION)
    with pytest.raises(AssertionError, match="d4"):  # a scale for each channel instead of each field
        assert_equivariant(stirred(FieldAttention(64, 1, name)), **ATTENTION)


def test_one_scale_for_each_field():
    layer, x = stirred(FieldAttention(8, 8, "se")), torch.randn(2, 64, 5, 5)
    scale = (layer(x) / x).reshape(2, 8, -1)  # [B, m * |G|, H, W] -> [B, m, |G| * H * W]
    assert torch.allclose(scale, scale[..., :1].expand_as(scale), atol=1e-4)
    assert scale[..., 0].std() > 0.1
    assert type(layer.per_field) is SEModule


@pytest.mark.parametrize("name", ["cbam", "coord", "halo", "sk", "attention", None, ""])
def test_what_depends_on_the_position_or_is_unknown_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'" if name else "attn_layer"):
        FieldAttention(8, 8, name)
