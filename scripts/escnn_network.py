"""A network of this package as an escnn network with the same output, its modules named as in equivision.

`equivision_timm.weights.equivision.convert_original` converts the `state_dict()` of that network, which includes its
bases, back. Needs the extra `escnn`.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from equivision_timm.escnn_interop import field_type, gspace, import_escnn
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.layers import Blur2d, ConvNormAct, FieldAttention, SteerableConv2d
from equivision_timm.models import EquivariantResNet
from equivision_timm.torch_state import BatchNorm
from equivision_timm.weights.escnn_format import translate_basis

if TYPE_CHECKING:
    from escnn.nn import FieldType, GeometricTensor, R2Conv  # pyright: ignore[reportMissingImports]  an extra

_STAGES = ("layer1", "layer2", "layer3", "layer4")


def to_escnn(model: EquivariantResNet) -> "EscnnResNet":
    """An escnn network with the outputs of `model` and a copy of its weights, in eval mode.

    Example:
        network = to_escnn(timm.create_model("c8resnet18"))
        network(torch.randn(1, 3, 225, 225))  # plain images in, logits out

    Raises:
        ValueError: the model has an activation, norm, pooling, low pass, attention, stem or dilation that the original
            network lacks.
    """
    stem = {"conv1": ConvNormAct, "maxpool": nn.MaxPool2d}
    for name, module in model.named_modules():
        if isinstance(module, (Blur2d, FieldAttention)) or not isinstance(module, stem.get(name, nn.Module)):
            raise ValueError(f"{name} is a {type(module).__name__}: the original network does not have it")
        if isinstance(module, ConvNormAct) and not (
            isinstance(module.norm.per_field, nn.BatchNorm2d) and module.conv.dilation == 1
        ):
            raise ValueError(f"{name} is dilated or its norm is not a batch norm, unlike the original network")
        if isinstance(module, ConvNormAct) and type(module.act) not in (nn.ReLU, nn.Identity):
            raise ValueError(f"{name}.act is a {type(module.act).__name__}: the original network has ReLU")
    pools = model.global_pool.pool_type, model.group_pool.pool_type
    if pools != ("avg", "max") or not isinstance(model.fc, nn.Linear):
        raise ValueError(f"the original network pools by average and maximum and classifies: this one pools by {pools}")
    return EscnnResNet(model).eval()


class EscnnResNet(nn.Module):
    """The original network in escnn: images [B, in_chans, H, W] -> logits [B, num_classes]."""

    def __init__(self, model: EquivariantResNet) -> None:
        super().__init__()
        enn = import_escnn().nn
        space = gspace(model.group)
        self.in_type: Any = enn.FieldType(space, model.in_chans * [space.trivial_repr])  # a FieldType
        conv, norm = _conv_norm(model.conv1, self.in_type)
        self.conv1: nn.Module = conv
        self.bn1: nn.Module = norm
        self.relu: nn.Module = enn.ReLU(conv.out_type)
        self.maxpool: nn.Module = enn.PointwiseMaxPool(conv.out_type, kernel_size=3, stride=2, padding=1)
        in_type = conv.out_type
        for name in _STAGES:
            blocks = []
            for block in model.get_submodule(name).children():
                blocks.append(EscnnBlock(block, in_type))
                in_type = blocks[-1].out_type
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool: nn.Module = enn.PointwiseAdaptiveAvgPool(in_type, 1)
        self.gpool: nn.Module = enn.GroupPooling(in_type)
        weight = model.fc.get_parameter("weight")  # [num_classes, fields]
        self.fc: nn.Linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.fc.load_state_dict(model.fc.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = import_escnn().nn.GeometricTensor(x, self.in_type)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in _STAGES:
            x = self.get_submodule(name)(x)
        x = self.gpool(self.avgpool(x)).tensor  # [B, fields, 1, 1]
        return self.fc(x.flatten(1))  # [B, fields, 1, 1] -> [B, fields]


class EscnnBlock(nn.Module):
    """A basic block or a bottleneck: convolutions conv1, conv2, ... with norms bn1, bn2, ..., and the shortcut."""

    def __init__(self, block: nn.Module, in_type: "FieldType") -> None:
        super().__init__()
        enn = import_escnn().nn
        self.depth: int = 0
        self.out_type: Any = in_type  # a FieldType
        while hasattr(block, f"conv{self.depth + 1}"):
            self.depth += 1
            conv, norm = _conv_norm(block.get_submodule(f"conv{self.depth}"), self.out_type)
            self.add_module(f"conv{self.depth}", conv)
            self.add_module(f"bn{self.depth}", norm)
            self.add_module(f"relu{self.depth}", enn.ReLU(conv.out_type))
            self.out_type = conv.out_type
        self.downsample: nn.Module = nn.Identity()
        if isinstance(shortcut := block.get_submodule("downsample"), ConvNormAct):
            self.downsample = nn.Sequential(*_conv_norm(shortcut, in_type))

    def forward(self, x: "GeometricTensor") -> "GeometricTensor":
        shortcut = self.downsample(x)
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
            x = self.get_submodule(f"relu{i}")(x if i < self.depth else x + shortcut)
        return x


def _conv_norm(module: nn.Module, in_type: "FieldType") -> tuple["R2Conv", nn.Module]:
    """The convolution and the norm of `module` in escnn, with its weights."""
    enn, source, norm = import_escnn().nn, module.get_submodule("conv"), module.get_submodule("norm.per_field")
    assert isinstance(source, SteerableConv2d)  # checked by `to_escnn`
    assert isinstance(norm, nn.BatchNorm2d)
    conv = enn.R2Conv(
        in_type,
        field_type(source.group, source.out_fields),
        source.kernel_size,
        stride=source.stride,
        padding=source.padding,
        bias=False,
        initialize=False,
    )
    target = next(value for name, value in conv.named_buffers() if name.endswith("sampled_basis"))
    basis = load_kernel_basis(source.kernel).sample().flatten(3)
    translation = translate_basis(basis, target, type(module).__name__)
    weight = source.weight.detach().squeeze(-1).double() @ translation  # [out_fields, in_fields, n_basis]
    conv.weights = nn.Parameter(weight.float().flatten())  # (o, i, b), flat
    batch_norm = enn.InnerBatchNorm(conv.out_type, eps=norm.eps, momentum=norm.momentum)
    (inner,) = (m for m in batch_norm.modules() if isinstance(m, BatchNorm))
    inner.load_state_dict(norm.state_dict())
    return conv, batch_norm
