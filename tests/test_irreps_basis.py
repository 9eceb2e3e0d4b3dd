"""The block-diagonal form against the sampled kernels, in both systems of coordinates."""

from dataclasses import replace

import pytest
import torch

from equivision_timm.irreps_basis import load_irreps_basis, sums_and_differences
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel

KERNELS = [
    Kernel(group, size, cutoff=cutoff, low_pass=low_pass)
    for group in ("c1", "c2", "c3", "c4", "c8", "d1", "d2", "d3", "d4", "d6")
    for size, cutoff, low_pass in ((1, None, False), (3, None, False), (3, 3, False), (5, None, False), (5, None, True))
]
KERNELS += [Kernel("c16", 5), Kernel("d16", 3), Kernel("c4", 7), Kernel("c3", 7, cutoff=3)]


def block_kernels(basis):
    """The kernels [n_basis, |G|, |G|, k, k] of y^ = W A (phi * f^), f^ = Q f, y = Q^T y^."""
    order, n, rows, row, entry = len(basis.fourier), len(basis.functions), [], 0, 0
    for d, copies in basis.blocks:
        w = basis.coefficients[:, entry : entry + d * n * d].unflatten(1, (d, n, d))
        entry += d * n * d
        for _ in range(copies):
            a = basis.coupling[row * n : (row + d) * n].view(n, d, n, order)  # (block, copy, j, row), (j', s)
            rows.append(torch.einsum("brjc,jcks,kyx->brsyx", w, a, basis.functions))
            row += d
    return torch.einsum("rg,brsyx,sh->bghyx", basis.fourier, torch.cat(rows, 1), basis.fourier)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_blocks_are_the_kernels(kernel):
    basis, kernels = load_irreps_basis(kernel), load_kernel_basis(kernel).sample()
    assert (block_kernels(basis) - kernels).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(basis.coefficients) == len(kernels)  # no kernel is lost
    coupling = basis.coupling.clone()
    coupling[-1] *= -1
    assert (block_kernels(replace(basis, coupling=coupling)) - kernels).abs().max() > 0.01  # the control


@pytest.mark.parametrize(
    ("kernel", "count"),
    [(Kernel("c8", 1), [1]), (Kernel("c4", 3), [1, 3, 2, 2, 2, 1]), (Kernel("c8", 3), [1, 3, 2, 2, 2, 1])],
    ids=lambda value: getattr(value, "name", None),
)
def test_functions_consist_of_few_sums_and_differences(kernel, count):
    inverse = torch.linalg.pinv(sums_and_differences(kernel.size))
    terms = inverse.T @ load_irreps_basis(kernel).functions @ inverse
    assert (terms.abs() > 1e-12).sum((1, 2)).tolist() == count


def test_sums_and_differences():
    e = sums_and_differences(5)
    assert e.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, -1, 0, 1, 0], [1, 0, 0, 0, 1], [-1, 0, 0, 0, 1]]
