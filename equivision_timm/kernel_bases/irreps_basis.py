"""A kernel basis in the irreps basis, where it is block diagonal: what makes the fast convolutions fast.

Turn the fields (of regular input) to the irreps basis, f^ = Q f, and filter every channel with the same few functions
of the plane, S_j = phi_j * f^. The product of the irreps of phi and f^ decomposes into irreps again,

    T[(r, j)] = sum_{j', s} A[(r, j), (j', s)] S_j'[s],    A[(r, j), (j', s)] = sum_h Q[r, h] D(h)[j, j'] Q[s, h]

with phi_j(h^-1 x) = sum_j' D(h)[j, j'] phi_j'(x). In terms of T the basis element

    K_b(x)[g, h] = k_b(g^-1 x, g^-1 h),  k_b(x, u) = sum_j C[b, j, u] phi_j(x)

acts without regard to the position and commutes with the group, so that Schur's lemma makes it block diagonal:

    y^[r] = sum_{j, s} (Q kappa_bj Q^T)[r, s] T[(s, j)]
    kappa_bj[g, h] = sum_j' C[b, j', u] D(u^-1)[j', j],  u = g^-1 h

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019), for the kernels; Serre, Linear
Representations of Finite Groups (1977), for the decomposition. `tests/layers/test_conv_strategies.py` compares with
`KernelBasis.sample`.
"""

from dataclasses import dataclass

import torch

from equivision_timm.constants import constant
from equivision_timm.kernel_bases.basis import load_kernel_basis

__all__ = ["FunctionSet", "IrrepsBasis", "block_coefficients", "block_products", "load_irreps_basis"]


@dataclass(frozen=True)
class FunctionSet:
    """Functions of the plane that the group mixes among themselves, n of them.

    Attributes:
        terms: [n, 3, 3] (3x3 kernels) or [n, 1, 1], the pixels of phi written in sums and differences of neighbours,
            phi_j(y, x) = sum_ab terms[j, a, b] e_a(y) e_b(x), e = (0, 1, 0), (1, 0, 1), (-1, 0, 1); row-reduced, so
            that few are not zero.
        product: A [|G| * n, n * |G|], rows (block, copy, j, row of the block), columns (j', s); None for the identity.
    """

    terms: torch.Tensor
    product: torch.Tensor | None


@dataclass(frozen=True)
class IrrepsBasis:
    """One frozen basis in block-diagonal form, float64, on the CPU.

    Attributes:
        fourier: Q [|G|, |G|].
        blocks: (size, copies) of each block, as `Group.irreps`.
        sets: the functions of the plane.
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
        return sum(len(functions.terms) for functions in self.sets)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(size, n, size) of each block's matrix in `coefficients`."""
        return [(size, self.functions, size) for size, _ in self.blocks]

    @property
    def products(self) -> int:
        """Multiplications that a pair of fields costs at each pixel."""
        return self.functions * sum(copies * size**2 for size, copies in self.blocks)


@constant
def load_irreps_basis(group_name: str, kernel_size: int) -> IrrepsBasis:
    """The frozen basis of k x k kernels between regular fields, block diagonal.

    Raises:
        ValueError: no such basis was frozen.
    """
    basis = load_kernel_basis(group_name, kernel_size, "regular")
    group, order = basis.group, basis.group.order
    fourier, blocks = group.fourier_matrix(), group.irreps()
    psi = basis.functions[0].flatten(1)  # [J, k * k]
    moved = basis.functions.flatten(2)  # psi_j(h^-1 x): [|G|, J, k * k]
    mixing = moved @ torch.linalg.pinv(psi)  # psi_j(h^-1 x) = sum_j' D(h)[j, j'] psi_j'(x): [|G|, J, J]
    inverses = [group.inverse(u) for u in range(order)]

    terms = torch.linalg.solve(_pixels(kernel_size).T, psi.T).T  # psi = terms pixels: [J, k * k]
    sets, matrices = [], []
    for members in _connected(mixing):
        reduced, change = _row_reduce(terms[members])  # phi = change psi
        back = torch.linalg.inv(change)
        d = change @ mixing[:, members][:, :, members] @ back  # D of phi: [|G|, n, n]
        c = torch.einsum("bju,jk->bku", basis.coefficients[:, members], back)  # C of phi: [n_basis, n, |G|]
        kappa = torch.einsum("bku,ukj->bju", c, d[inverses])[..., group.left_quotients()]  # [n_basis, n, |G|, |G|]
        in_irreps = fourier @ kappa @ fourier.T
        product = torch.einsum("rh,hjk,sh->rjks", fourier, d, fourier)  # A: [|G|, n, n, |G|], rows (r, j)
        reduced = reduced.unflatten(1, (kernel_size, kernel_size))  # [n, k * k] -> [n, k, k]
        alone = torch.allclose(d, torch.eye(len(members), dtype=d.dtype, device="cpu"))  # then A = 1 for each
        for j in [[n] for n in range(len(members))] if alone else [slice(None)]:
            matrices.append(in_irreps[:, j])
            sets.append(FunctionSet(reduced[j], None if alone else _block_rows(product, blocks)))

    entries, row = [], 0
    for size, copies in blocks:
        own = slice(row, row + size)  # the first copy; the others are equal
        matrix = torch.cat([m[:, :, own, own] for m in matrices], 1)  # [n_basis, n, size, size]
        entries.append(matrix.transpose(1, 2).flatten(1))  # [n_basis, size (row) * n * size (column)]
        row += size * copies
    return IrrepsBasis(fourier, blocks, tuple(sets), torch.cat(entries, 1))


@constant
def block_coefficients(group_name: str, kernel_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The coefficients of `load_irreps_basis`, [n_basis, entries]; not to be changed in place."""
    return load_irreps_basis(group_name, kernel_size).coefficients.to(device, dtype)


@constant
def block_products(group_name: str, kernel_size: int) -> int:
    """The multiplications of `load_irreps_basis` that a pair of fields costs at each pixel."""
    return load_irreps_basis(group_name, kernel_size).products


def _pixels(kernel_size: int) -> torch.Tensor:
    """The products e_a(y) e_b(x) on the pixels: [9, 9] for 3x3 kernels, [1, 1] for 1x1."""
    e = {1: [[1.0]], 3: [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]}[kernel_size]
    e = torch.tensor(e, dtype=torch.float64, device="cpu")
    return torch.kron(e, e)


def _connected(mixing: torch.Tensor) -> list[list[int]]:
    """The functions that D [|G|, J, J] mixes with one another; first, together, those that no element changes."""
    identity = torch.eye(mixing.shape[1], dtype=mixing.dtype, device="cpu")
    unchanged = (mixing - identity).abs().amax((0, 2)) < 1e-9
    linked = mixing.abs().amax(0) > 1e-9
    components: list[list[int]] = []
    for j in (~unchanged).nonzero().flatten().tolist():
        touched = [component for component in components if linked[j, component].any()]
        components = [component for component in components if component not in touched]
        components.append(sorted([j, *(i for component in touched for i in component)]))
    return [unchanged.nonzero().flatten().tolist(), *sorted(components)]


def _row_reduce(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduced row echelon form of independent rows [n, terms], the largest entry of a row its pivot, and the change."""
    reduced, change = rows.clone(), torch.eye(len(rows), dtype=rows.dtype, device="cpu")
    for n in range(len(rows)):
        pivot = int(reduced[n].abs().argmax())
        scale = reduced[:, pivot] / reduced[n, pivot]
        scale[n] = 1 - 1 / reduced[n, pivot]
        for matrix in (reduced, change):
            matrix -= scale[:, None] * matrix[n].clone()
    return torch.where(reduced.abs() < 1e-12, 0.0, reduced), change


def _block_rows(product: torch.Tensor, blocks: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Rows (r, j) -> (block, copy, j, row of the block): [|G|, n, n, |G|] -> [|G| * n, n * |G|]."""
    parts = product.split([size for size, copies in blocks for _ in range(copies)])  # each [size, n, n, |G|]
    return torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts]).flatten(1)
