"""ResNets in the format of escnn and e2cnn: names of the entries, kernel bases, and the network in escnn itself.

A convolution holds its coefficients `weights`, one flat vector in the order (output field o, input field i, basis
element b), the order of `weight` [out_fields, in_fields, n_basis, 1] here. Other entries may determine the basis:

- `sampled_basis` B' [n_basis, |G|, H, k^2]: sum_b w'_b B'_b = sum_b w_b B_b gives w = w' T with T B = B', by least
  squares, exact since both span the same space;
- `filter` K [O |G|, I H, k, k], the expanded filter: sum_b w_b B_b = K gives w likewise;
- neither: the coefficients are taken as they are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from equivision_timm.escnn_interop import field_type, gspace, import_escnn
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.layers import Blur2d, ConvNormAct, FieldAttention, SteerableConv2d
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.torch_internals import BatchNorm
from equivision_timm.weights.checkpoint import Entries

if TYPE_CHECKING:
    from escnn.nn import FieldType, GeometricTensor, R2Conv  # pyright: ignore[reportMissingImports]  an extra

__all__ = ["EscnnBlock", "EscnnResNet", "Translated", "to_escnn", "translate_basis", "translate_resnet"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_TOLERANCE = 1e-4  # relative residual of least squares; float32 leaves 1e-6


@dataclass(frozen=True)
class Translated:
    """A state dict of an `EquivariantResNet`.

    Attributes:
        state_dict: its entries, float32.
        sources: what determined the coefficients: 'sampled_basis', 'filter', 'coefficients'.
        residual: largest relative residual of the least squares, 0 without.
    """

    state_dict: dict[str, torch.Tensor]
    sources: frozenset[str]
    residual: float


def translate_resnet(state_dict: dict[str, torch.Tensor], model: EquivariantResNet) -> Translated:
    """The entries of `model` from those of the same network in escnn.

    Raises:
        WeightsError: entries are missing, left over or of another shape; a basis or filter of another group; a filter
            that contradicts the coefficients.
    """
    order, entries = Group.from_name(model.group).order, Entries(state_dict)
    found: dict[str, torch.Tensor] = {}
    sources, residuals = set(), [0.0]
    for name, unit in model.named_modules():
        if not isinstance(unit, ConvNormAct):
            continue
        conv, norm = _names(name)
        weight, source, residual = _coefficients(entries, conv, unit.conv)
        found[f"{name}.conv.weight"] = weight
        sources.add(source)
        residuals.append(residual)
        for key in unit.norm.per_field.state_dict():
            found[f"{name}.norm.per_field.{key}"] = entries.take(f"{norm}.batch_norm_[{order}].{key}")
    found |= {f"fc.{key}": entries.take(f"fc.{key}") for key in model.fc.state_dict()}
    entries.left = {name: value for name, value in entries.left.items() if f"indices_{order}" not in name}
    entries.check_empty()
    result = {}
    for name, expected in model.state_dict().items():
        if found[name].shape != expected.shape:
            raise WeightsError(f"{name} would have shape {tuple(found[name].shape)}, not {tuple(expected.shape)}")
        result[name] = found[name].detach().to(expected.dtype).clone()
    return Translated(result, frozenset(sources), max(residuals))


def _names(unit: str) -> tuple[str, str]:
    """Names of convolution and norm in escnn: 'layer1.0.conv2' -> ('layer1.0.conv2', 'layer1.0.bn2')."""
    parent, dot, last = unit.rpartition(".")
    if last == "downsample":
        return f"{unit}.0", f"{unit}.1"
    return unit, f"{parent}{dot}{last.replace('conv', 'bn')}"


def _coefficients(entries: Entries, name: str, conv: SteerableConv2d) -> tuple[torch.Tensor, str, float]:
    """Coefficients [out_fields, in_fields, n_basis, 1], what determined them, and the residual."""
    shape = conv.weight.shape
    weight = entries.take(f"{name}.weights").detach().float()
    if weight.numel() != conv.weight.numel():
        raise WeightsError(f"{name}.weights has {weight.numel()} coefficients, {conv.weight.numel()} are needed")
    weight = weight.reshape(shape[:3])  # from (o, i, b), flat
    basis = load_kernel_basis(conv.kernel).sample()  # [n_basis, |G|, H, k, k]
    bases = [key for key in entries.left if key.startswith(f"{name}._basis") and key.endswith("sampled_basis")]
    filters = entries.left.pop(f"{name}.filter", None)
    solved, residual = None, 0.0
    if filters is not None:
        solved, residual = _solve_filter(filters, basis, conv, name)
    if bases:
        if len(bases) > 1:
            raise WeightsError(f"{name} has {len(bases)} entries sampled_basis: remove one of them")
        sampled = entries.take(bases[0])
        if sampled.shape != basis.flatten(3).shape:
            raise WeightsError(f"{bases[0]} has shape {tuple(sampled.shape)}, not {tuple(basis.flatten(3).shape)}")
        translation, residual = translate_basis(sampled, basis, name)
        weight = (weight.double() @ translation).float()
    if solved is not None:
        # without a sampled_basis, the basis of the file may have other signs
        a, b = (weight, solved) if bases else (weight.abs(), solved.abs())
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        if not error <= 1e-3 + 4 * torch.finfo(filters.dtype).eps:
            raise WeightsError(f"{name}.weights and its filter disagree (relative error {error:.1e})")
        weight = weight if bases else solved
    return weight.unsqueeze(-1), "sampled_basis" if bases else "coefficients" if solved is None else "filter", residual


def _solve_filter(
    filters: torch.Tensor, basis: torch.Tensor, conv: SteerableConv2d, name: str
) -> tuple[torch.Tensor, float]:
    """Coefficients [out_fields, in_fields, n_basis] of an expanded filter [O |G|, I H, k, k], and the residual."""
    (o, i), (_, order, h, *size) = conv.weight.shape[:2], basis.shape
    if tuple(filters.shape) != (o * order, i * h, *size):
        raise WeightsError(f"{name}.filter has shape {tuple(filters.shape)}, not {(o * order, i * h, *size)}")
    blocks = filters.unflatten(0, (o, order)).unflatten(2, (i, h)).transpose(1, 2)  # [O, I, |G|, H, k, k]
    solved, residual = _solve(blocks.flatten(2).flatten(0, 1), basis, name)
    return solved.float().unflatten(0, (o, i)), residual


def translate_basis(source: torch.Tensor, target: torch.Tensor, name: str) -> tuple[torch.Tensor, float]:
    """T [n_basis, n_basis] with T target = source, so that w T are coefficients in `target`; and the relative residual.

    Args:
        source: kernels [n_basis, |G|, H, ...].
        target: the same kernels in another basis.
        name: of the convolution, for the error.

    Raises:
        WeightsError: the two span different spaces.
    """
    translation, residual = _solve(source.flatten(1), target, name)
    rank = torch.linalg.matrix_rank(translation, rtol=1e-3).item()
    if rank < len(source):
        raise WeightsError(f"{name}: the sampled_basis has {len(source)} kernels, but only {rank} independent ones")
    signs = translation.round()
    is_signs = torch.allclose(translation, signs, rtol=0, atol=1e-5)  # without rounding errors then
    return (signs if is_signs else translation), residual


def _solve(rows: torch.Tensor, basis: torch.Tensor, name: str) -> tuple[torch.Tensor, float]:
    """X [n, n_basis], float64, with X basis = rows [n, values] by least squares, and the relative residual."""
    values, flat = rows.double(), basis.double().flatten(1)
    solution = values @ torch.linalg.pinv(flat)
    residual = ((solution @ flat - values).abs().max() / values.abs().max().clamp_min(1e-30)).item()
    if not residual <= _TOLERANCE + torch.finfo(rows.dtype).eps:
        raise WeightsError(
            f"the kernels of {name} are not equivariant under the group of this model (relative residual "
            f"{residual:.1e}): the checkpoint belongs to another group"
        )
    return solution, residual


def to_escnn(model: EquivariantResNet) -> "EscnnResNet":
    """An escnn network that computes what `model` computes, with a copy of its weights, in eval mode.

    Example:
        network = to_escnn(timm.create_model("c8resnet18"))
        network(torch.randn(1, 3, 225, 225))  # plain images in, logits out

    Raises:
        ValueError: the model has an activation, norm, pooling, low pass, attention, stem or dilation that the original
            network lacks.
        ImportError: the extra is not installed.
    """
    stem = {"conv1": ConvNormAct, "maxpool": nn.MaxPool2d}
    for name, module in model.named_modules():
        if isinstance(module, (Blur2d, FieldAttention)) or not isinstance(module, stem.get(name, nn.Module)):
            raise ValueError(f"{name} is a {type(module).__name__}: the original network has none there")
        if isinstance(module, ConvNormAct) and not (
            isinstance(module.norm.per_field, nn.BatchNorm2d) and module.conv.dilation == 1
        ):
            raise ValueError(f"{name} is no BatchNorm2d or is dilated: the original network has neither")
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
        self.out_type: Any = in_type  # a FieldType, unknown where escnn is not installed
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
    enn, ours, norm = import_escnn().nn, module.get_submodule("conv"), module.get_submodule("norm.per_field")
    assert isinstance(ours, SteerableConv2d)  # checked by `to_escnn`
    assert isinstance(norm, nn.BatchNorm2d)
    conv = enn.R2Conv(
        in_type,
        field_type(ours.group, ours.out_fields),
        ours.kernel_size,
        stride=ours.stride,
        padding=ours.padding,
        bias=False,
        initialize=False,
    )
    theirs = next(value for name, value in conv.named_buffers() if name.endswith("sampled_basis"))
    basis = load_kernel_basis(ours.kernel).sample().flatten(3)
    translation, _ = translate_basis(basis, theirs, type(module).__name__)
    weight = ours.weight.detach().squeeze(-1).double() @ translation  # [out_fields, in_fields, n_basis]
    conv.weights = nn.Parameter(weight.float().flatten())  # (o, i, b), flat
    batch_norm = enn.InnerBatchNorm(conv.out_type, eps=norm.eps, momentum=norm.momentum)
    (inner,) = (m for m in batch_norm.modules() if isinstance(m, BatchNorm))
    inner.load_state_dict(norm.state_dict())
    return conv, batch_norm
