"""A kernel basis in the irreps basis, in which it is block diagonal: the form of the fast convolutions.

Transform the fields (of regular input) to the irreps basis, f^ = Q f, and filter every channel with the same few
functions of the plane, S_j = phi_j * f^. The product of the irreps of phi and f^ decomposes into irreps again,

    T[(r, j)] = sum_{j', s} A[(r, j), (j', s)] S_j'[s],    A[(r, j), (j', s)] = sum_h Q[r, h] D(h)[j, j'] Q[s, h]

with phi_j(h^-1 x) = sum_j' D(h)[j, j'] phi_j'(x). On T the basis element

    K_b(x)[g, h] = k_b(g^-1 x, g^-1 h),  k_b(x, u) = sum_j C[b, j, u] phi_j(x)

acts pixel by pixel and commutes with the group, so that by Schur's lemma it is block diagonal:

    y^[r] = sum_{j, s} (Q kappa_bj Q^T)[r, s] T[(s, j)]
    kappa_bj[g, h] = sum_j' C[b, j', u] D(u^-1)[j', j],  u = g^-1 h

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019), for the kernels; Serre, Linear
Representations of Finite Groups (1977), for the decomposition.
"""

from dataclasses import dataclass

import torch

from equivision_timm.constants import constant
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel, harmonics, mixing, pixels

__all__ = ["IrrepsBasis", "load_irreps_basis", "sums_and_differences"]


@dataclass(frozen=True)
class IrrepsBasis:
    """A kernel basis in block-diagonal form, float64, on the CPU.

    `coefficients` are for each block the matrices [size, J, size] (row, function, column) of all basis elements,
    flattened; the copies of a block share them. The rows of A are (block, copy, function, row of the block).
    """

    fourier: torch.Tensor  # Q [|G|, |G|]
    blocks: tuple[tuple[int, int], ...]  # (size, copies) of each, as `Group.irreps`
    functions: torch.Tensor  # phi [J, k, k]
    coupling: torch.Tensor  # A [|G| * J, J * |G|]
    coefficients: torch.Tensor  # [n_basis, entries]


@constant
def load_irreps_basis(kernel: Kernel) -> IrrepsBasis:
    """The basis of the kernels between regular fields, block diagonal."""
    group, coefficients = Group.from_name(kernel.group), load_kernel_basis(kernel).coefficients
    fourier, blocks = group.fourier_matrix(), group.irreps()
    change = _change_to_few_terms(kernel)
    back = torch.linalg.inv(change)
    d = change @ mixing(kernel) @ back  # D of phi: [|G|, J, J]

    a = torch.einsum("rh,hjk,sh->rjks", fourier, d, fourier)
    rows = a.split([size for size, copies in blocks for _ in range(copies)])  # each [size, J, J, |G|]
    coupling = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in rows]).flatten(1)

    inverses = [group.inverse(u) for u in range(group.order)]
    kappa = torch.einsum("biu,ij,ujk->bku", coefficients, back, d[inverses])  # [n_basis, J, |G|]
    products = [[group.product(g, u) for g in range(group.order)] for u in range(group.order)]
    entries, row = [], 0
    for size, copies in blocks:
        q = fourier[row : row + size]  # of the first copy; the others are equal
        irrep = torch.einsum("rg,sug->urs", q, q[:, products])  # Q [h = g u] Q^T: [|G|, size, size]
        entries.append(torch.einsum("bju,urs->brjs", kappa, irrep).flatten(1))
        row += size * copies
    functions = torch.einsum("ij,jyx->iyx", change, pixels(kernel))
    return IrrepsBasis(fourier, blocks, functions, coupling, torch.cat(entries, 1))


def sums_and_differences(size: int) -> torch.Tensor:
    """e [k, k] float64, rows e_0, s_1, d_1, s_2, d_2, ... over the pixels of an axis, with 0 in the middle.

    e_0 is 1 in the middle; s_i is 1 at -i and i; d_i is -1 at -i and 1 at i; zero elsewhere.
    """
    middle, e = size // 2, torch.zeros(size, size, dtype=torch.float64)
    e[0, middle] = 1
    for i in range(1, middle + 1):
        e[2 * i - 1, middle - i] = e[2 * i - 1, middle + i] = e[2 * i, middle + i] = 1
        e[2 * i, middle - i] = -1
    return e


def _change_to_few_terms(kernel: Kernel) -> torch.Tensor:
    """[J, J] of phi = change psi: functions phi that are sums of few products e_a(y) e_b(x) of `sums_and_differences`.

    Functions that the group transforms alike may be added. Their terms, one row for each, are brought to reduced row
    echelon form, the largest entry of a row its pivot.
    """
    psi, changes = pixels(kernel), []
    e = sums_and_differences(psi.shape[-1])
    inverse = e / e.abs().sum(1, keepdim=True)  # the rows of e are orthogonal
    terms = (inverse @ psi @ inverse.T).flatten(1)  # psi = e^T terms e
    for change in _alike(kernel):  # [members, 1 or 2, J]
        for m in range(len(change)):
            rows = (change @ terms).flatten(1)
            pivot = rows[m].abs().argmax()
            member = change[m] / rows[m, pivot]
            change = change - rows[:, pivot, None, None] * member
            change[m] = member
        changes.append(change.flatten(0, 1))
    return torch.cat(changes)


def _alike(kernel: Kernel) -> list[torch.Tensor]:
    """[members, 1 or 2, J] of members psi that the group transforms alike: single functions, or (cos, +-sin).

    First those that no element changes.
    """
    d, found = mixing(kernel), {}
    unit = torch.eye(d.shape[1], dtype=torch.float64)
    for harmonic in harmonics(kernel):
        js = harmonic.js
        mixed = len(js) == 2 and bool(d[:, js[0], js[1]].any())
        for member in [js] if mixed else [[j] for j in js]:
            psi = unit[member]
            if mixed:
                psi[1] *= d[1, js[0], js[1]].sign()  # frequencies m and N - m differ by the sign of sin
            action = psi @ d @ psi.T
            found.setdefault(tuple(action.flatten().tolist()), []).append(psi)
    return [torch.stack(found[action]) for action in sorted(found, key=lambda action: set(action) != {1.0})]
