"""A kernel basis in the irreps basis, where it is block diagonal: what makes the fast convolutions fast.

Turn the fields (of regular input) to the irreps basis, f^ = Q f, and filter every channel with the same few functions
of the plane, S_j = phi_j * f^. The product of the irreps of phi and f^ decomposes into irreps again,

    T[(r, j)] = sum_{j', s} A[(r, j), (j', s)] S_j'[s],    A[(r, j), (j', s)] = sum_h Q[r, h] D(h)[j, j'] Q[s, h]

with phi_j(h^-1 x) = sum_j' D(h)[j, j'] phi_j'(x). In terms of T the basis element

    K_b(x)[g, h] = k_b(g^-1 x, g^-1 h),  k_b(x, u) = sum_j C[b, j, u] phi_j(x)

acts without regard to the position and commutes with the group, so that Schur's lemma makes it block diagonal:

    y^[r] = sum_{j, s} (Q kappa_bj Q^T)[r, s] T[(s, j)]
    kappa_bj[g, h] = sum_j' C[b, j', u] D(u^-1)[j', j],  u = g^-1 h

The functions phi are sums of those of `functions.py`: whatever the group transforms alike may be added up, to the end
that few sums of neighbouring pixels make up all of them.

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019), for the kernels; Serre, Linear
Representations of Finite Groups (1977), for the decomposition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equivision_timm.constants import constant
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Family, Kernel, families, mixing, pixels

__all__ = [
    "FunctionSet",
    "IrrepsBasis",
    "block_coefficients",
    "load_irreps_basis",
    "sums_and_differences",
]


@dataclass(frozen=True)
class FunctionSet:
    """Functions of the plane that the group mixes among themselves, n of them: one, or what was cos and sin.

    Attributes:
        pixels: phi [n, k, k].
        mixing: D [|G|, n, n], phi_j(g^-1 x) = sum_j' D(g)[j, j'] phi_j'(x).
        product: A [|G| * n, n * |G|], rows (block, copy, j, row of the block), columns (j', s); None for the identity,
            where no element changes the function.
    """

    pixels: torch.Tensor
    mixing: torch.Tensor
    product: torch.Tensor | None


@dataclass(frozen=True)
class IrrepsBasis:
    """A kernel basis in block-diagonal form, float64, on the CPU.

    Attributes:
        fourier: Q [|G|, |G|].
        blocks: (size, copies) of each block, as `Group.irreps`.
        sets: the functions of the plane; first those that no element changes.
        coefficients: [n_basis, entries]: for each block the matrices [size, n, size] (row, function of any set, column)
            of all basis elements, flattened; the copies of a block share them.
    """

    fourier: torch.Tensor
    blocks: tuple[tuple[int, int], ...]
    sets: tuple[FunctionSet, ...]
    coefficients: torch.Tensor

    @property
    def functions(self) -> int:
        """How many functions of the plane there are, over all sets."""
        return sum(len(functions.pixels) for functions in self.sets)

    def couple(self, steered: Sequence[torch.Tensor]) -> torch.Tensor:
        """T = A S, of all sets together.

        Args:
            steered: S of each set, [n * |G|, ...], rows (j', s).

        Returns:
            T [functions * |G|, ...], rows (block, copy, function of any set, row of the block).
        """
        sets = [
            s if functions.product is None else torch.tensordot(functions.product, s, 1)
            for functions, s in zip(self.sets, steered, strict=True)
        ]  # of each set, rows (block, copy, j, row of the block)
        rows, row = [], 0
        for size, copies in self.blocks:
            for _ in range(copies):
                for functions, own in zip(self.sets, sets, strict=True):
                    n = len(functions.pixels)
                    rows.append(own[row * n : (row + size) * n])
                row += size
        return torch.cat(rows)


@constant
def load_irreps_basis(kernel: Kernel) -> IrrepsBasis:
    """The basis of the kernels between regular fields, block diagonal.

    Raises:
        ValueError: the input is trivial; or as `load_kernel_basis`.
    """
    if kernel.input_type != "regular":
        raise ValueError(f"the kernels {kernel.name} have {kernel.input_type} input: only regular fields have irreps")
    basis, group = load_kernel_basis(kernel), Group.from_name(kernel.group)
    fourier, blocks = group.fourier_matrix(), group.irreps()
    psi, mixed = pixels(kernel), mixing(kernel)
    inverses = [group.inverse(u) for u in range(group.order)]

    sets, kappas = [], []  # kappa_bj [n_basis, n, |G|], n functions of a set
    for family in sorted(families(kernel), key=lambda family: not family.fixed):
        phi, back = _reduced(family, psi)
        own = [[j for j, _ in member] for member in family.members]  # [members, n]
        signs = [[sign for _, sign in member] for member in family.members]
        signs = torch.tensor(signs, dtype=torch.float64, device="cpu")  # [members, n]
        d = mixed[:, own[0]][:, :, own[0]] * signs[0, :, None] * signs[0]  # [|G|, n, n]
        product = None if family.fixed else _block_rows(_product(fourier, d), blocks)
        c = basis.coefficients[:, own] * signs[..., None]  # [n_basis, members, n, |G|]
        c = torch.einsum("bmku,mi->biku", c, back)  # C of phi
        kappas += torch.einsum("biku,ukj->biju", c, d[inverses]).unbind(1)
        sets += [FunctionSet(member, d, product) for member in phi]

    kappa = torch.cat(kappas, 1)  # [n_basis, functions, |G|]
    products = [[group.product(g, u) for g in range(group.order)] for u in range(group.order)]
    entries, row = [], 0
    for size, copies in blocks:
        rows = fourier[row : row + size]  # of the first copy; the others are equal
        irrep = torch.einsum("rg,sug->urs", rows, rows[:, products])  # Q [h = g u] Q^T: [|G|, size, size]
        matrix = torch.einsum("bju,urs->brjs", kappa, irrep)  # [n_basis, size (row), n, size (column)]
        entries.append(matrix.flatten(1))
        row += size * copies
    return IrrepsBasis(fourier, blocks, tuple(sets), torch.cat(entries, 1))


@constant
def block_coefficients(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The coefficients of `load_irreps_basis`, [n_basis, entries]; not to be changed in place."""
    return load_irreps_basis(kernel).coefficients.to(device, dtype)


def sums_and_differences(size: int) -> torch.Tensor:
    """e [k, k], rows e_0, s_1, d_1, s_2, d_2, ... over the pixels of an axis, whose middle is 0.

    e_0 is 1 in the middle; s_i is 1 at -i and at i; d_i is -1 at -i and 1 at i; zero elsewhere.
    """
    middle, e = size // 2, torch.zeros(size, size, dtype=torch.float64, device="cpu")
    e[0, middle] = 1
    for i in range(1, middle + 1):
        e[2 * i - 1, middle - i] = e[2 * i - 1, middle + i] = e[2 * i, middle + i] = 1
        e[2 * i, middle - i] = -1
    return e


def _terms(images: torch.Tensor) -> torch.Tensor:
    """`images` [n, k, k] in products of `sums_and_differences`: terms [n, k, k] with images = e^T terms e."""
    e = sums_and_differences(images.shape[-1])
    inverse = e / e.abs().sum(1, keepdim=True)  # the rows of e are orthogonal
    return inverse @ images @ inverse.T


def _reduced(family: Family, psi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """phi [members, n, k, k], sums of the members of a family that consist of few terms; back [members, members].

    What the members were is sum_i back[m, i] phi_i. The terms, one row [n * k * k] for each member, are brought to
    reduced row echelon form, the largest entry of a row its pivot.
    """
    members = torch.stack([torch.stack([sign * psi[j] for j, sign in member]) for member in family.members])
    rows = _terms(members.flatten(0, 1)).view(len(members), -1)  # [members * n, k, k] -> [members, n * k * k]
    change = torch.eye(len(rows), dtype=rows.dtype, device="cpu")  # phi = change members
    for m in range(len(rows)):
        pivot = int(rows[m].abs().argmax())
        change[m] /= rows[m, pivot].clone()
        rows[m] /= rows[m, pivot].clone()
        for other in range(len(rows)):
            if other != m:
                change[other] -= rows[other, pivot] * change[m]
                rows[other] -= rows[other, pivot].clone() * rows[m]
                rows[other, pivot] = 0.0
    e = sums_and_differences(psi.shape[-1])
    return e.T @ rows.view_as(members) @ e, torch.linalg.inv(change)


def _product(fourier: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """A [|G|, n, n, |G|], rows (r, j), columns (j', s); what is zero but for rounding becomes zero."""
    product = torch.einsum("rh,hjk,sh->rjks", fourier, d, fourier)
    return torch.where(product.abs() < 1e-12, 0.0, product)


def _block_rows(product: torch.Tensor, blocks: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Rows (r, j) -> (block, copy, j, row of the block): [|G|, n, n, |G|] -> [|G| * n, n * |G|]."""
    parts = product.split([size for size, copies in blocks for _ in range(copies)])  # each [size, n, n, |G|]
    return torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts]).flatten(1)
