"""The kernel basis that a strategy multiplies the coefficients with, in the type and on the device of the weights."""

import torch

from equivision_timm.constants import constant, fitting
from equivision_timm.kernel_bases import Kernel, block_coefficients, sample_kernels
from equivision_timm.layers.conv_strategies.context import leaves_python

__all__ = ["basis_for"]


def basis_for(weight: torch.Tensor, group: str, kernel_size: int, form: str) -> torch.Tensor:
    """A constant, not to be changed in place.

    Args:
        weight: whose type and device it gets.
        group: name of the group.
        kernel_size: of the kernels.
        form: 'regular' or 'trivial', the kernels [n_basis, |G|, H, k, k] for such input; or 'irreps', the coefficients
            [n_basis, entries] of those for regular input, block diagonal.
    """
    if torch.compiler.is_dynamo_compiling() and not leaves_python():  # as a node of the graph, on every device
        return torch.ops.equivision_timm.kernel_basis(weight.detach(), group, kernel_size, form)
    return fitting(_basis(weight.dtype, weight.device, group, kernel_size, form), weight)


@constant
def _basis(dtype: torch.dtype, device: torch.device, group: str, kernel_size: int, form: str) -> torch.Tensor:
    if form == "irreps":
        return block_coefficients(Kernel(group, kernel_size), dtype, device)
    return sample_kernels(Kernel(group, kernel_size, form), dtype, device)


@torch.library.custom_op("equivision_timm::kernel_basis", mutates_args=())
def _kernel_basis(weight: torch.Tensor, group: str, kernel_size: int, form: str) -> torch.Tensor:
    basis = _basis(weight.dtype, weight.device, group, kernel_size, form)
    return basis.clone(memory_format=torch.contiguous_format)  # a compiler may reuse its memory


@_kernel_basis.register_fake
def _(weight, group, kernel_size, form):
    return weight.new_empty(_basis(weight.dtype, torch.device("meta"), group, kernel_size, form).shape)
