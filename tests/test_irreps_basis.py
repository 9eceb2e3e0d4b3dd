"""The block-diagonal form against the sampled kernels, for groups and sizes with and without a table."""

from dataclasses import replace

import pytest
import torch

from equivision_timm.groups import Group
from equivision_timm.irreps_basis import block_coefficients, load_irreps_basis, sums_and_differences
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel

KERNELS = [
    Kernel(group, size, cutoff=cutoff, low_pass=low_pass)
    for group in ("c1", "c2", "c3", "c4", "c8", "d1", "d2", "d3", "d4", "d6")
    for size, cutoff, low_pass in ((1, None, False), (3, None, False), (3, 3, False), (5, None, False), (5, None, True))
]
KERNELS += [Kernel("c16", 5), Kernel("d16", 3), Kernel("c4", 7), Kernel("c3", 7, cutoff=3)]
by_name = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def terms(functions):
    """phi_j(y, x) = sum_ab terms[j, a, b] e_a(y) e_b(x): [n, k, k], with the e of `sums_and_differences`."""
    inverse = torch.linalg.pinv(sums_and_differences(functions.pixels.shape[-1]))
    found = inverse.T @ functions.pixels @ inverse
    return torch.where(found.abs() < 1e-12, 0.0, found)


def block_kernels(basis):
    """What y^ = W A (phi * f^), f^ = Q f, y = Q^T y^ amounts to: kernels [n_basis, |G|, |G|, k, k]."""
    order, size = len(basis.fourier), basis.sets[0].pixels.shape[-1]
    found = torch.zeros(len(basis.coefficients), order, order, size, size, dtype=torch.float64)
    row = entry = 0
    for d, copies in basis.blocks:
        w = basis.coefficients[:, entry : entry + d * basis.functions * d]
        w = w.unflatten(1, (d, basis.functions, d))
        entry += d * basis.functions * d
        for _ in range(copies):
            parts = w.split([len(functions.pixels) for functions in basis.sets], 2)
            for functions, part in zip(basis.sets, parts, strict=True):
                n = len(functions.pixels)
                if functions.product is None:
                    a = torch.eye(order, dtype=torch.float64)[row : row + d].view(1, d, 1, order)
                else:  # rows (block, copy, j, row of the block), columns (j', s)
                    a = functions.product[row * n : (row + d) * n].view(n, d, n, order)
                found[:, row : row + d] += torch.einsum("brjc,jcks,kyx->brsyx", part, a, functions.pixels)
            row += d
    return torch.einsum("rg,brsyx,sh->bghyx", basis.fourier, found, basis.fourier)


@by_name
def test_blocks_are_the_kernels(kernel):
    basis, kernels = load_irreps_basis(kernel), load_kernel_basis(kernel).sample()
    assert (block_kernels(basis) - kernels).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(basis.coefficients) == len(kernels)  # no kernel is lost
    assert torch.equal(block_coefficients(kernel, torch.float64, torch.device("cpu")), basis.coefficients)


@by_name
def test_sets_are_functions_that_the_group_mixes(kernel):
    basis, psi = load_irreps_basis(kernel), load_kernel_basis(kernel).functions
    group = Group.from_name(kernel.group)
    for functions in basis.sets:
        assert torch.equal(functions.mixing[0], torch.eye(len(functions.pixels)).double())
        assert (functions.product is None) == torch.equal(
            functions.mixing, functions.mixing[:1].expand_as(functions.mixing)
        )
        for g in group.grid_elements:  # phi(g^-1 x) is phi moved by g
            expected = group.transform_image(functions.pixels, g)
            found = torch.einsum("jk,kyx->jyx", functions.mixing[g], functions.pixels)
            assert (found - expected).abs().max() < 1e-12
        assert terms(functions).abs().max() >= 1 - 1e-12
    # they span the functions of the kernel, also where the group moves them between the pixels
    mixed = torch.cat([torch.einsum("gjk,kyx->jgyx", f.mixing, f.pixels) for f in basis.sets]).flatten(1)
    moved = psi.transpose(0, 1).flatten(1)
    assert torch.linalg.lstsq(mixed.T, moved.T).solution.T.matmul(mixed).sub(moved).abs().max() < 1e-12


def test_a_wrong_sign_is_seen():
    kernel = Kernel("c6", 3)
    basis, kernels = load_irreps_basis(kernel), load_kernel_basis(kernel).sample()
    *others, last = basis.sets
    signs = torch.ones(len(last.product), 1, dtype=torch.float64)
    signs[0] = -1
    wrong = replace(basis, sets=(*others, replace(last, product=signs * last.product)))
    assert (block_kernels(wrong) - kernels).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kernel", "count"),
    [(Kernel("c8", 1), [1]), (Kernel("c4", 3), [1, 3, 4, 2, 1]), (Kernel("c8", 3), [1, 3, 4, 3])],
    ids=lambda value: getattr(value, "name", None),
)
def test_few_terms(kernel, count):
    assert [int(terms(functions).count_nonzero()) for functions in load_irreps_basis(kernel).sets] == count


def test_sums_and_differences():
    e = sums_and_differences(5)
    assert e.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, -1, 0, 1, 0], [1, 0, 0, 0, 1], [-1, 0, 0, 0, 1]]


def test_only_regular_fields():
    with pytest.raises(ValueError, match="c4-3-trivial have trivial input: only regular fields have irreps"):
        load_irreps_basis(Kernel("c4", 3, "trivial"))
