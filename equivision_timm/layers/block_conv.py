"""Steerable convolutions for deployment: block diagonal, constant weights, only standard operators.

    T = P * x             to the irreps basis, through the functions of the plane
    y^ = W T + b^         a convolution in groups of two rows
    y = Q^T y^            back

The algorithm of `strategies/block_diagonal.py`, with its symbols. Runtimes such as onnxruntime know neither
blocks nor fields, so that both are laid out for them: maps are element-major, [B, |G| * fields, H, W] with channel =
element * fields + field, where a change of basis is one product of matrices; and blocks of one row are joined in pairs,
so that all are of one size, the groups of a grouped convolution.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from equivision_timm.layers.blur import Blur2d
from equivision_timm.layers.conv import SteerableConv2d, is_watched
from equivision_timm.layers.conv_norm_act import ConvNormAct
from equivision_timm.layers.strategies.basis import basis_for, block_shapes, block_weights

__all__ = ["BlockConv2d", "ElementMajor", "element_major_conv", "element_major_stage", "swap_major"]


def swap_major(x: torch.Tensor, first: int) -> torch.Tensor:
    """[B, first * second, H, W], channel = i * second + j -> the same with channel = j * first + i."""
    B, C, H, W = x.shape
    return x.reshape(B, first, C // first, H, W).transpose(1, 2).reshape(B, C, H, W)  # through [B, second, first, H, W]


class ElementMajor(nn.Module):
    """`stage`, which works on element-major maps, on field-major ones: [B, fields * |G|, H, W] in and out."""

    def __init__(self, stage: nn.Module, order: int) -> None:
        super().__init__()
        self.stage = stage
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swap_major(self.stage(swap_major(x, x.shape[1] // self.order)), self.order)


class BlockConv2d(nn.Module):
    """The convolution of a steerable layer with constant coefficients and a bias, in the irreps basis.

    Element-major maps: [B, |G| * in_fields, H, W] -> [B, |G| * out_fields, H', W']. `weight` are the coefficients
    [O, I, n_basis, 1] of `conv`, a layer with regular input, of D_N or an even C_N; `bias` [O] is added to each field.
    """

    def __init__(self, conv: SteerableConv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.order: int = conv.order
        self.in_fields: int = conv.in_fields
        self.out_fields: int = conv.out_fields
        self.kernel_size: int = conv.kernel_size
        self.stride: int = conv.stride
        self.padding: int = conv.padding
        self.dilation: int = conv.dilation
        weight, bias, name, dtype = weight.detach(), bias.detach(), conv.kernel.name, conv.weight.dtype
        matrices, back = _matrices(block_weights(weight, name), name), basis_for(weight, name, "fourier")
        lifting, ones = basis_for(weight, name, "lifting"), sum(size == 1 for _, _, size in block_shapes(name))
        if ones < len(matrices):  # the blocks of one row come first
            pairs = [torch.block_diag(*matrices[i : i + 2]) for i in range(0, ones, 2)]
            matrices = pairs + matrices[ones:]
        self.groups: int = len(matrices)
        self.lifting: nn.Parameter = _constant(lifting[:, :, 0, 0] if conv.kernel_size == 1 else lifting, dtype)
        self.weight: nn.Parameter = _constant(torch.cat(matrices)[..., None, None], dtype)
        spread = back.sum(1)[:, None] * bias  # b^ = Q b, where b is equal for all elements: [rows, O]
        self.bias: nn.Parameter = _constant(spread.flatten(), dtype)
        self.fourier: nn.Parameter = _constant(back.T, dtype)  # Q^T [|G|, rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self._lift(x)  # T = P * x: [B, rows * I, H', W']
        y = F.conv2d(t, self.weight, self.bias, groups=self.groups)  # y^ = W T + b^: [B, rows * O, H', W']
        return _mix(self.fourier, y, self.out_fields)  # y = Q^T y^: [B, |G| * O, H', W']

    def _lift(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == 1:  # T = Q x
            x = x[:, :, :: self.stride, :: self.stride].contiguous() if self.stride > 1 else x
            return _mix(self.lifting, x, self.in_fields)
        B, _, H, W = x.shape
        fields = x.reshape(B, self.order, self.in_fields, H, W).transpose(1, 2)
        fields = fields.reshape(B * self.in_fields, self.order, H, W)
        t = F.conv2d(fields, self.lifting, None, self.stride, self.padding, self.dilation)  # [B * I, rows, H', W']
        _, rows, H, W = t.shape
        return t.reshape(B, self.in_fields, rows, H, W).transpose(1, 2).reshape(B, rows * self.in_fields, H, W)

    def extra_repr(self) -> str:
        return f"{self.in_fields}, {self.out_fields}, order={self.order}, kernel_size={self.kernel_size}"


def element_major_stage(stage: nn.Module, containers: tuple[type[nn.Module], ...]) -> nn.Module:
    """`stage` in place on element-major maps inside `ElementMajor`, if any of its convolutions becomes block diagonal.

    A stage with parts that depend on the order of the channels (attention, other norms, replaced modules, hooks) is
    returned as it is, with its children converted that have none. `containers` are the classes that only combine their
    children.
    """
    units = _units(stage, containers)
    if units is None:
        for name, child in stage.named_children():
            if type(child) in containers:
                setattr(stage, name, element_major_stage(child, containers))
        return stage
    if not any(_pays(unit.conv) for unit in units):
        return stage
    order = units[0].conv.order
    for unit in units:
        unit.replace_conv(element_major_conv)
    return ElementMajor(stage, order).train(stage.training)


def _units(module: nn.Module, containers: tuple[type[nn.Module], ...]) -> list[ConvNormAct] | None:
    """The units that `module` consists of; None if anything in it depends on the order of the channels."""
    if is_watched(module):
        return None
    if type(module) in (Blur2d, nn.MaxPool2d, nn.Identity):  # act on each channel, on all alike
        return []
    if type(module) in containers:
        units: list[ConvNormAct] = []
        for child in module.children():
            own = _units(child, containers)
            if own is None:
                return None
            units += own
        return units
    if type(module) is not ConvNormAct or not module.is_fusible() or module.folded() is None:
        return None
    return [module] if module.conv.input_type == "regular" and type(module.attn) is nn.Identity else None


@torch.no_grad()
def element_major_conv(conv: SteerableConv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d | BlockConv2d:
    """A convolution on element-major maps in the form that costs less: `BlockConv2d`, with its arguments, or dense."""
    if _pays(conv):
        return BlockConv2d(conv, weight, bias)
    dense, order = conv.dense_conv(weight, bias), conv.order
    filters = dense.weight.unflatten(1, (-1, order)).unflatten(0, (-1, order))  # [O, |G|, I, |G|, k, k]
    filters = filters.permute(1, 0, 3, 2, 4, 5).flatten(2, 3).flatten(0, 1)  # [|G| * O, |G| * I, k, k]
    dense.weight = _constant(filters, conv.weight.dtype)
    dense.bias = _constant(bias.repeat(order), conv.weight.dtype)  # [|G| * O]
    return dense


def _pays(conv: SteerableConv2d) -> bool:
    """Whether blocks cost less than the dense filter by a margin, counted in products at a pixel of the output.

    Odd C_N have an odd number of blocks of one row, which cannot be joined in pairs.

    Fitted to onnxruntime 1.32 on an AMD EPYC, for 60 layers of five networks: a value that is lifted costs as much as
    100 products, or its own at three quarters of the speed; one that is only changed in basis, 25.
    """
    order, pairs, pixels = conv.order, conv.in_fields * conv.out_fields, conv.kernel_size**2
    shapes = block_shapes(conv.kernel.name)
    functions, size = shapes[0][1], max(size for _, _, size in shapes)
    dense = pairs * pixels * order**2
    lift = 25 if pixels == 1 else max(100, 1.3 * pixels * order)
    blocks = pairs * functions * order * size + lift * conv.in_fields * functions * order + 25 * conv.out_fields * order
    return order % 2 == 0 and dense > 1.2 * blocks


def _mix(matrix: torch.Tensor, x: torch.Tensor, fields: int) -> torch.Tensor:
    """matrix [m, n], x [B, n * fields, H, W] -> [B, m * fields, H, W]."""
    B, _, H, W = x.shape
    m, n = matrix.shape  # no -1 below: it has no value for an empty batch
    return (matrix @ x.reshape(B, n, fields * H * W)).reshape(B, m * fields, H, W)


def _matrices(entries: torch.Tensor, kernel: str) -> list[torch.Tensor]:
    """W [size * O, n * size * I] of each block and copy, from the entries [entries, O, I] of `block_weights`."""
    matrices, start = [], 0
    for copies, n, size in block_shapes(kernel):
        w = entries[start : start + size * n * size].unflatten(0, (size, n * size))  # [size, n * size, O, I]
        matrices += [w.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)] * copies
        start += size * n * size
    return matrices


def _constant(tensor: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype, copy=True).contiguous(), requires_grad=False)
