"""The constants of the strategies, in the type and on the device of their tensors, and the weights made with them."""

from functools import cache

import torch

from equivision_timm.constants import constant, constant_like
from equivision_timm.irreps_basis import load_irreps_basis
from equivision_timm.kernel_basis import sample_kernels
from equivision_timm.kernels import Kernel
from equivision_timm.torch_state import FakeTensor, FunctionalTensor, leaves_python

__all__ = ["basis_for", "block_shapes", "block_weights", "lifting_filter", "named_kernel"]


@constant
def named_kernel(name: str) -> Kernel:
    """The kernels called `name`."""
    return Kernel.from_name(name)


def basis_for(like: torch.Tensor, kernel: str, form: str) -> torch.Tensor:
    """A constant in the type and on the device of `like`, not to be changed in place.

    `form` is 'pixels', the kernels [n_basis, |G|, H, k, k]; 'blocks', the coefficients [n_basis, entries] of those for
    regular input in the irreps basis, block diagonal; 'lifting', the filter of `lifting_filter`; or 'fourier', Q
    [|G|, |G|].
    """
    traced = torch.compiler.is_compiling() or isinstance(like, FunctionalTensor)  # the latter also in torch 2.8
    if traced and not leaves_python():  # as a node of the graph, on every device
        return torch.ops.equivision_timm.kernel_basis(like.detach(), kernel, form)
    if isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        return constant_like(like, _basis, kernel, form)
    return _cached_basis(kernel, form, like.dtype, like.device)


def block_weights(weight: torch.Tensor, kernel: str) -> torch.Tensor:
    """W [entries, O, I], for each block [size (row), n, size (column), O, I] flattened, of w [O, I, n_basis, 1]."""
    coefficients = basis_for(weight, kernel, "blocks")
    w = weight.flatten(0, 1).squeeze(-1)  # [O * I, n_basis]
    entries = coefficients.T @ w.T  # W = sum_b w_b coefficients_b: [entries, O * I]
    return entries.reshape(-1, weight.shape[0], weight.shape[1])  # [entries, O, I]


def lifting_filter(kernel: Kernel) -> torch.Tensor:
    """P [|G| * functions, |G|, k, k], float64: T = P * f, of each regular field f.

    It joins the steps f^ = Q f, S[j, s] = phi_j * f^[s] and T = A S of `irreps_basis.py`:

        P[t, g](x) = sum_{j, s} A[t, (j, s)] phi_j(x) Q[s, g]

    The rows are (block, copy, function, row of the block).
    """
    basis = load_irreps_basis(kernel)
    steered = torch.einsum("jyx,sg->jsgyx", basis.functions, basis.fourier).flatten(0, 1)  # S: [J * |G|, |G|, k, k]
    return torch.tensordot(basis.coupling, steered, 1)


@constant
def block_shapes(kernel: str) -> tuple[tuple[int, int, int], ...]:
    """(copies, functions, size) of each block in the irreps basis: its matrix is [size, functions * size]."""
    basis = load_irreps_basis(named_kernel(kernel))
    return tuple((copies, len(basis.functions), size) for size, copies in basis.blocks)


@constant
def _basis(kernel: str, form: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    kernels = named_kernel(kernel)
    if form == "pixels":
        return sample_kernels(kernels, dtype, device)
    irreps = load_irreps_basis(kernels)
    exact = {"blocks": irreps.coefficients, "fourier": irreps.fourier}.get(form)
    return (lifting_filter(kernels) if exact is None else exact).to(device, dtype)


_cached_basis = cache(_basis)  # without the check whether torch.compile traces


@torch.library.custom_op("equivision_timm::kernel_basis", mutates_args=())
def _kernel_basis(like: torch.Tensor, kernel: str, form: str) -> torch.Tensor:
    basis = _basis(kernel, form, like.dtype, like.device)
    return basis.clone(memory_format=torch.contiguous_format)  # a compiler may reuse its memory


@_kernel_basis.register_fake
def _(like, kernel, form):
    return like.new_empty(_basis(kernel, form, like.dtype, torch.device("meta")).shape)
