"""Batch norm of fields by channel: the definition in float64, all memory formats, running statistics, derivatives."""

import copy

import pytest
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3

from equivision_timm.layers import norm as norm_module
from equivision_timm.layers.field_batch_norm import field_batch_norm, field_batch_norm_by_definition
from equivision_timm.layers.norm import FieldNorm

LAST = torch.channels_last
FIELDS = 5


def field_norm(order: int, dtype: torch.dtype = torch.float64, **kwargs) -> FieldNorm:
    torch.manual_seed(0)
    norm = FieldNorm(FIELDS, order, lambda fields, **dd: nn.BatchNorm2d(fields, **kwargs, **dd)).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def stock(norm: FieldNorm, x: torch.Tensor) -> torch.Tensor:
    """The wrapped batch norm on [B, m, |G| * H, W]: the definition."""
    b, c, h, w = x.shape
    return norm.per_field(x.contiguous().view(b, norm.fields, norm.order * h, w)).view(b, c, h, w)


def maps(order: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, FIELDS * order, 4, 3, dtype=dtype) * 2 + 30  # far from zero: no digits may be lost


def results(norm: FieldNorm, apply, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = apply(norm, x)
    gradients = torch.autograd.grad(y, [x, *norm.parameters()], dy)
    return {"y": y, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=False)), **dict(norm.named_buffers())}


@pytest.mark.parametrize("order", [2, 8])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False])
def test_is_the_stock_batch_norm_of_fields(order, kwargs, train, monkeypatch):
    calls = []
    by_channel = norm_module.FieldNorm._batch_norm
    monkeypatch.setattr(norm_module.FieldNorm, "_batch_norm", lambda self, x: calls.append(x) or by_channel(self, x))
    ours = field_norm(order, **kwargs)
    theirs = copy.deepcopy(ours)
    for _ in range(3):  # running statistics add up
        x, dy = maps(order), maps(order) - 30
        expected = results(theirs.train(train), stock, x, dy)
        found = results(ours.train(train), FieldNorm.__call__, x.contiguous(memory_format=LAST), dy)
    assert len(calls) == 3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=name)
    assert found["y"].is_contiguous(memory_format=LAST)
    assert found["dx"].is_contiguous(memory_format=LAST)


def test_the_maps_as_they_lie():
    """Contiguous maps on the CPU take the stock layer, whose reshape copies nothing there."""
    norm = field_norm(8)
    x = maps(8)
    assert not norm._goes_by_channel(x)
    assert norm._goes_by_channel(x.contiguous(memory_format=LAST))
    assert norm._goes_by_channel(x.to("meta"))


def test_one_wrong_factor_is_seen():
    """The control: statistics of channels, not joined over the group, are another function."""
    x = maps(8) + torch.arange(8.0).repeat(FIELDS).view(1, -1, 1, 1)
    norm = field_norm(8)
    weight, bias = norm.per_field.weight.repeat_interleave(8), norm.per_field.bias.repeat_interleave(8)
    separate = nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    assert (separate - stock(norm, x)).abs().max() > 0.5


@pytest.mark.parametrize("by_channel", [field_batch_norm, field_batch_norm_by_definition])
def test_first_and_second_derivatives(by_channel):
    norm = field_norm(2)
    x = maps(2, batch=2)[:, :, :2, :2].contiguous(memory_format=LAST).requires_grad_()
    inputs = (x, norm.per_field.weight, norm.per_field.bias)

    def function(x, weight, bias):
        return by_channel(x, 2, weight, bias, 1e-5)[0]

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Statistics of half types are sums in float32, as the stock layer's."""
    norm = field_norm(8, torch.float32)
    x = maps(8).to(dtype)
    exact = stock(copy.deepcopy(norm).double(), x.double())
    y = norm(x.contiguous(memory_format=LAST))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * exact.abs().max().item())
    torch.testing.assert_close(norm.per_field.running_mean.double() / 0.1, maps_mean(x), rtol=1e-5, atol=0)


def maps_mean(x: torch.Tensor) -> torch.Tensor:
    return x.double().view(len(x), FIELDS, -1).mean((0, 2))


def test_constant_fields():
    norm = field_norm(8)
    x = torch.full((2, FIELDS * 8, 3, 3), 7.0, dtype=torch.float64)
    y = norm(x.contiguous(memory_format=LAST))
    torch.testing.assert_close(y, norm.per_field.bias.repeat_interleave(8).view(1, -1, 1, 1).expand_as(y))
    assert (norm.per_field.running_var - 0.9).abs().max() < 1e-12


def test_frozen_parameters_and_input():
    norm = field_norm(8)
    x = maps(8).contiguous(memory_format=LAST)
    norm.per_field.weight.requires_grad_(False)
    norm(x).sum().backward()
    assert norm.per_field.weight.grad is None
    torch.testing.assert_close(norm.per_field.bias.grad, torch.full_like(norm.per_field.bias, 3 * 8 * 12))


def test_one_value_for_each_field_is_refused():
    x = torch.ones(1, FIELDS, 1, 1, dtype=torch.float64)
    norm = field_norm(1)
    with pytest.raises(ValueError, match="more than 1 value"):  # the stock layer
        norm(x)
    with pytest.raises(ValueError, match="more than one value"):
        norm._batch_norm(x)


def test_other_norms_keep_the_memory_format():
    x = maps(8, torch.float32).contiguous(memory_format=LAST)
    norm = FieldNorm(FIELDS, 8, lambda fields, **dd: nn.GroupNorm(1, fields, **dd))
    assert not norm._goes_by_channel(x)
    y = norm(x)
    assert y.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(y, norm(x.contiguous()))
    assert norm(x.contiguous()).is_contiguous()


def test_watched_or_replaced_batch_norms_are_called():
    x = maps(8, torch.float32).contiguous(memory_format=LAST)
    norm = field_norm(8, torch.float32)
    shapes = []
    handle = norm.per_field.register_forward_hook(lambda module, args, y: shapes.append(y.shape))
    hooked = norm(x)
    handle.remove()
    assert shapes == [(3, FIELDS, 32, 3)]
    torch.testing.assert_close(norm.eval()(x) - norm(x), torch.zeros_like(x))
    torch.testing.assert_close(hooked, field_norm(8, torch.float32)(x))
    subclass = FieldNorm(FIELDS, 8, lambda fields, **dd: BatchNormAct2d(fields, **dd))
    assert not subclass._goes_by_channel(x)
    assert (subclass(x) >= 0).all()  # its activation
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    assert not synchronised._goes_by_channel(x)


def test_an_average_of_weights_sees_the_statistics():
    norm = field_norm(8, torch.float32)
    average = ModelEmaV3(norm, decay=0.5)
    norm(maps(8, torch.float32).contiguous(memory_format=LAST))
    average.update(norm)
    start = field_norm(8, torch.float32).per_field.running_mean
    expected = (start + norm.per_field.running_mean) / 2
    torch.testing.assert_close(average.module.per_field.running_mean, expected)
