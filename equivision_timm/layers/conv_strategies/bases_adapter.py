"""Stand-in for what `kernel_bases` will offer for any kernel."""

import torch
from dataclasses import dataclass
from equivision_timm.constants import constant
from equivision_timm.groups import Group
from equivision_timm import kernel_bases as old
from equivision_timm.kernel_bases import irreps_basis as ib
from equivision_timm.kernel_bases.basis import KernelBasis, Ring, sample_functions

FROZEN = ("c1", "d1", "c4", "d4", "c8", "d8")
BINOMIAL = torch.tensor([1.0, 2, 1], dtype=torch.float64) / 4


@constant
def load_kernel_basis(kernel):
    if kernel.group in FROZEN and kernel.cutoff == 2 and not kernel.low_pass and (kernel.size, kernel.input_type) in (
        (1, "regular"), (3, "regular"), (1, "trivial"), (3, "trivial"), (7, "trivial")):
        return old.load_kernel_basis(kernel.group, kernel.size, kernel.input_type)
    group = Group.from_name(kernel.group)
    size = kernel.size - 2 * kernel.low_pass
    rings = tuple(Ring(r, 0.6 if r else 0.005, kernel.cutoff * r) for r in range(size // 2 + 1))
    functions = sample_functions(group, size, rings)
    if kernel.low_pass:
        functions = torch.nn.functional.conv2d(functions.flatten(0, 1)[:, None], torch.outer(BINOMIAL, BINOMIAL)[None, None], padding=2)
        functions = functions.unflatten(0, (group.order, -1))[:, :, 0]
    h = group.order if kernel.input_type == "regular" else 1
    j = functions.shape[1]
    if kernel.input_type == "trivial":
        raise NotImplementedError
    c = torch.eye(j * h, dtype=torch.float64).unflatten(1, (j, h))
    return KernelBasis(group, c, functions, torch.ones(j * h, dtype=torch.float64) / (j * h) ** 0.5)


@constant
def sample_kernels(kernel, dtype, device):
    return load_kernel_basis(kernel).sample().to(device, dtype)


@constant
def initial_std(kernel, dtype, device):
    return load_kernel_basis(kernel).he_std.to(device, dtype)


@dataclass(frozen=True)
class Functions:
    pixels: torch.Tensor
    product: torch.Tensor | None


def one_dimensional(kernel):
    if kernel.low_pass and kernel.size == 5:
        return torch.tensor([[0, 1, 2, 1, 0], [1, 2, 2, 2, 1], [-1, -2, 0, 2, 1]], dtype=torch.float64)
    k, rows = kernel.size, []
    for t in range(k // 2 + 1):
        for sign in (1, -1)[: 1 + (t > 0)]:
            row = torch.zeros(k, dtype=torch.float64)
            row[k // 2 + t] = 1
            row[k // 2 - t] = sign
            rows.append(row)
    return torch.stack(rows)


@constant
def load_irreps_basis(kernel):
    basis = load_kernel_basis(kernel)
    group, order = basis.group, basis.group.order
    fourier, blocks = group.fourier_matrix(), group.irreps()
    psi = basis.functions[0].flatten(1)
    mixing = basis.functions.flatten(2) @ torch.linalg.pinv(psi)
    inverses = [group.inverse(u) for u in range(order)]
    e = one_dimensional(kernel)
    e = torch.kron(e, e)
    terms = psi @ torch.linalg.pinv(e)
    assert (terms @ e - psi).abs().max() < 1e-9
    sets, matrices = [], []
    for members in ib._connected(mixing):
        reduced, change = ib._row_reduce(terms[members])
        back = torch.linalg.inv(change)
        d = change @ mixing[:, members][:, :, members] @ back
        c = torch.einsum("bju,jk->bku", basis.coefficients[:, members], back)
        kappa = torch.einsum("bku,ukj->bju", c, d[inverses])[..., group.left_quotients()]
        in_irreps = fourier @ kappa @ fourier.T
        product = torch.einsum("rh,hjk,sh->rjks", fourier, d, fourier)
        pixels = (reduced @ e).unflatten(1, (kernel.size, kernel.size))
        alone = torch.allclose(d, torch.eye(len(members), dtype=d.dtype))
        for j in [[n] for n in range(len(members))] if alone else [slice(None)]:
            matrices.append(in_irreps[:, j])
            sets.append(Functions(pixels[j], None if alone else ib._block_rows(product, blocks)))
    entries, row = [], 0
    for size, copies in blocks:
        own = slice(row, row + size)
        matrix = torch.cat([m[:, :, own, own] for m in matrices], 1)
        entries.append(matrix.transpose(1, 2).flatten(1))
        row += size * copies
    out = ib.IrrepsBasis(fourier, blocks, tuple(sets), torch.cat(entries, 1))
    type(out).functions = property(lambda self: sum(len(getattr(s, "pixels", getattr(s, "terms", None))) for s in self.sets))
    return out


@constant
def block_coefficients(kernel, dtype, device):
    return load_irreps_basis(kernel).coefficients.to(device, dtype)


@constant
def block_products(kernel):
    return load_irreps_basis(kernel).products
