"""The kernel bases, in factored form.

A filter that maps fields of type `input` to regular fields commutes with the group exactly when

    K(x)[g, h] = k(g^-1 x, g^-1 h)                                     x: pixel, g: output, h: input element

(for trivial input there is no h). On a k x k grid the base kernel k is spanned by a few functions psi_j of the plane
(`functions.py`), so one basis element b is a small matrix of coefficients:

    k_b(x, h) = sum_j C[b, j, h] psi_j(x)

C is square: all such kernels are allowed, and n_basis = J * H. It only says which coordinates they are given in: those
of published weights where there is a table (`tables.py`), an orthonormal basis in closed form elsewhere
(`coordinates.py`). All is the same on every machine, to the last bit.

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019); Cohen and Welling, Group
Equivariant Convolutional Networks (2016).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from equivision_timm.constants import constant
from equivision_timm.groups import Group
from equivision_timm.kernel_bases.coordinates import closed_form
from equivision_timm.kernel_bases.functions import mix, pixels
from equivision_timm.kernel_bases.kernel import Kernel
from equivision_timm.kernel_bases.tables import load_table, manifest, sha256

__all__ = ["KernelBasis", "are_bases", "bases_sha256", "initial_std", "load_kernel_basis", "sample_kernels"]


@dataclass(frozen=True)
class KernelBasis:
    """A basis of `n_basis` equivariant kernels, float64, on the CPU.

    Attributes:
        group: the group it commutes with.
        coefficients: C [n_basis, J, H]; H = |G| for regular input, 1 for trivial input.
        functions: psi_j(g^-1 x) [|G|, J, k, k], the functions of the plane moved by every group element.
        he_std: [n_basis], the standard deviation of a coefficient at initialisation for ONE input field: divide by
            the root of the number of input fields (generalised He initialisation, Weiler and Cesa 2018).
    """

    group: Group
    coefficients: torch.Tensor
    functions: torch.Tensor
    he_std: torch.Tensor

    def sample(self) -> torch.Tensor:
        """The kernels on the pixel grid, [n_basis, |G|, H, k, k]; `sample_kernels` does it once for all callers.

        K_b(x)[g, h] = k_b(g^-1 x, g^-1 h) = sum_j C[b, j, g^-1 h] psi_j(g^-1 x), summed in the order of j
        """
        n_basis, _, elements = self.coefficients.shape
        order, _, *size = self.functions.shape
        if elements == 1:  # trivial input: no h, C[b, j] for every g
            quotients = torch.zeros(order, 1, dtype=torch.int64, device="cpu")
        else:
            quotients = self.group.left_quotients()
        kernels = torch.zeros(n_basis, order, elements, *size, dtype=torch.float64, device="cpu")
        for j, functions in enumerate(self.functions.unbind(1)):  # [|G|, k, k]
            own = self.coefficients[:, j].any(1).nonzero().flatten()  # the elements that contain psi_j: few
            moved = self.coefficients[own, j][:, quotients]  # [own, |G|, H]
            kernels[own] += moved[..., None, None] * functions[:, None]
        return kernels


@constant
def load_kernel_basis(kernel: Kernel) -> KernelBasis:
    """The basis of the kernels; with a low pass that of the kernels in front of it, with the same coefficients.

    Raises:
        ValueError: the cut-off lets functions through that are not independent on so few pixels.
        RuntimeError: the table of the basis is damaged.
    """
    unfiltered = replace(kernel, size=kernel.size - 2, low_pass=False) if kernel.low_pass else kernel
    table = load_table(unfiltered)
    coefficients, he_std = closed_form(unfiltered) if table is None else table
    return KernelBasis(Group.from_name(kernel.group), coefficients, mix(kernel, pixels(kernel)), he_std)


@constant
def sample_kernels(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The kernels of `load_kernel_basis` on the pixel grid, [n_basis, |G|, H, k, k]; not to be changed in place."""
    return load_kernel_basis(kernel).sample().to(device, dtype)


@constant
def initial_std(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The `he_std` [n_basis] of `load_kernel_basis`; not to be changed in place."""
    return load_kernel_basis(kernel).he_std.to(device, dtype)


def bases_sha256(kernels: Iterable[Kernel]) -> str:
    """The bases in whose coordinates a model with these kernels speaks: no other basis has a part in it."""
    bases = {kernel.name: load_kernel_basis(kernel) for kernel in kernels}
    each = [f"{name} {sha256(basis.coefficients, basis.he_std)}\n" for name, basis in sorted(bases.items())]
    return hashlib.sha256("".join(each).encode()).hexdigest()


def are_bases(found: str, kernels: Iterable[Kernel]) -> bool:
    """Whether a file that names `found` as its bases speaks in those of these kernels.

    That is `bases_sha256`; version 0.1 wrote the sha256 of all tables together.
    """
    kernels = set(kernels)
    tables_alone = all(load_table(kernel) is not None for kernel in kernels)
    return found == bases_sha256(kernels) or (tables_alone and found == manifest()["sha256"])
