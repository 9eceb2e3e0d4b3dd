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

An orthonormal basis of the equivariant kernels of any group, size and cut-off, in closed form.

Every base kernel k(x, u) = sum_j C[j, u] psi_j(x) is allowed (`basis.py`): the functions psi_j of the plane times any
basis of the functions of u span them all. Two choices are left.

Orthonormal: within each family of functions that the group transforms alike, Gram-Schmidt, from the centre outwards,
makes phi = R psi orthonormal over the pixels, averaged over the group. R does not depend on which member of a pair
(cos, sin) it is applied to, so that phi is transformed as psi is.

One irrep in, one irrep out: with u = r^t f^p, theta = 2 pi t / N, s = 0 ... N - 1 and both signs for D_N,

    k(x, u) = (phi_cos(x) cos(s theta) - phi_sin(x) sin(s theta)) (+-1)^p        "cos(m phi + s theta)"
    k(x, u) = (phi_sin(x) cos(s theta) + phi_cos(x) sin(s theta)) (+-1)^p        "sin(m phi + s theta)"

depends on h through the rotation frequency s, on g through m + s: it maps the irreps of frequency s to those of
frequency m + s. Where such a frequency is 0 or N / 2, the reflection f tells the irreps of D_N apart by a sign: of u,
(+-1); of the output, (+-1) (-1)^m for cos and the opposite for sin.

The standard deviations at initialisation are those of escnn (generalised He): all irreps that reach an irrep of the
output contribute the same variance to it, each by equal shares of its basis elements, and they make up 1 together.

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019); Weiler, Hamprecht and Storath,
Learning Steerable Filters for Rotation Equivariant CNNs (2018), for the initialisation.

The coordinates of published weights: bases that escnn 1.0.11 made for six groups, as data.

The kernels they span are those of the closed form, so that a table is a change of coordinates, a square matrix C
[n_basis, J * H] (`basis.py`). It cannot be computed: the D_4 and D_8 bases of escnn change sign with the linear-algebra
library of the machine. `tables.safetensors` holds them; `manifest.json` their origin, the rings of their functions, a
sha256 of each, and for every element of the original's kernels the harmonic, frequency and irreps.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from equivision_timm.constants import constant
from equivision_timm.groups import Group, circle
from equivision_timm.kernels import Kernel, Ring, families, harmonics, mix, pixels

__all__ = [
    "KernelBasis",
    "are_bases",
    "bases_sha256",
    "closed_form",
    "initial_std",
    "load_kernel_basis",
    "load_table",
    "manifest",
    "sample_kernels",
    "sha256",
    "table_key",
]


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


# What is left of the squared norm of a function without the part that earlier ones have: less is rounding. Independent
# functions of up to 9 x 9 pixels leave 0.003 or more, dependent ones 1e-10 or less.
_DEPENDENT = 1e-6

Irrep = tuple[int, int]  # rotation frequency 0 ... N / 2; for 0 and N / 2 the sign of the reflection as 0 or 1


def closed_form(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """C [n_basis, J, H] and he_std [n_basis], float64, on the CPU; the sampled kernels of C are orthonormal.

    The elements are ordered by the functions of the plane, then by s, the sign of the reflection, cos before sin.

    Args:
        kernel: without low pass, of which the coefficients know nothing.

    Raises:
        ValueError: the cut-off lets functions through that are not independent on so few pixels.
    """
    group, regular = Group.from_name(kernel.group), kernel.input_type == "regular"
    phi, n = _orthonormal(kernel), group.rotations
    elements = range(group.order if regular else 1)
    signs = range(2 if regular and group.reflections else 1)
    waves = torch.tensor(circle(n), dtype=torch.float64, device="cpu")  # cos and sin: [N, 2]
    factors = [[-1.0 if u >= n and sign else 1.0 for u in elements] for sign in signs]
    factors = torch.tensor(factors, dtype=torch.float64, device="cpu")[:, None]  # (+-1)^p: [signs, 1, H]

    blocks, irreps = [], []
    for harmonic in harmonics(kernel):
        m = harmonic.frequency
        for s in range(1) if not regular else range(n) if m else range(n // 2 + 1):
            cos, sin = waves[[s * u % n for u in elements]].T  # of s theta: [H]
            alone = 2 * s % n == 0  # s is 0 or N / 2, where sin is 0
            # |G| is the sum of squares over u, but for a single cos or sin other than +-1 half of it
            scale = math.sqrt((2 if m == 0 and not alone else 1) / (group.order * len(elements)))
            parts = range(1 if m == 0 and alone else 2)
            block = torch.zeros(len(signs), len(parts), len(phi), len(elements), dtype=torch.float64, device="cpu")
            for j, value in phi[harmonic.cos].items():
                block[:, :, j] += value * scale * (factors * torch.stack((cos, sin)[: len(parts)]))
            if harmonic.sin is not None:
                for j, value in phi[harmonic.sin].items():
                    block[:, :, j] += value * scale * (factors * torch.stack((-sin, cos)))
            blocks.append(block.flatten(0, 1))  # [signs, parts, J, H] -> [signs * parts, J, H]
            irreps += [
                (_irrep(group, s, sign), _irrep(group, m + s, sign + m + part)) for sign in signs for part in parts
            ]
    return torch.cat(blocks), torch.tensor(_he_std(group, irreps), dtype=torch.float64, device="cpu")


def _irrep(group: Group, frequency: int, sign: int) -> Irrep:
    """The irrep of a rotation frequency, and, where there are two, of the sign (-1)^sign under the reflection."""
    folded = min(frequency % group.rotations, -frequency % group.rotations)
    return folded, sign % 2 if group.reflections and 2 * folded % group.rotations == 0 else 0


def _he_std(group: Group, irreps: list[tuple[Irrep, Irrep]]) -> list[float]:
    """The standard deviations of basis elements that map one irrep to another, given as pairs."""
    elements = Counter(irreps)
    inputs = Counter(output for _, output in elements)  # how many irreps reach it
    # The channels of a field that belong to an irrep: its dimension times its multiplicity
    channels = {out: 1 if 2 * out[0] % group.rotations == 0 else 4 if group.reflections else 2 for out in inputs}
    return [math.sqrt(channels[pair[1]] / (inputs[pair[1]] * elements[pair])) for pair in irreps]


def _orthonormal(kernel: Kernel) -> list[dict[int, float]]:
    """phi_j = sum of value psi_j' over the items (j', value), for every j; see `_gram_schmidt`.

    Raises:
        ValueError: the functions are not independent.
    """
    phi = _gram_schmidt(kernel)
    if phi is None:
        smaller = range((kernel.cutoff or 1) - 1, 0, -1)  # the default always fits, and so does 1
        fitting = next(c for c in smaller if _gram_schmidt(replace(kernel, cutoff=c)) is not None)
        raise ValueError(
            f"cutoff {kernel.cutoff} does not fit {kernel.size}x{kernel.size} kernels of {kernel.group}: on so few "
            f"pixels functions of high frequency follow from the others; use cutoff {fitting}, or less"
        )
    return phi


def _gram_schmidt(kernel: Kernel) -> list[dict[int, float]] | None:
    """phi_j, the functions psi_j made orthonormal; None if they are not independent.

    The inner product is that over the pixels, averaged over the group. In a pair (cos, sin) that the group mixes it is
    the mean of those of both. `math.fsum` rounds each sum correctly, whatever its order.
    """
    psi = pixels(kernel).flatten(1).tolist()
    phi: list[dict[int, float]] = [{} for _ in psi]
    for family in families(kernel):
        members = family.members
        gram = [[_mean_product(psi, one, other) for other in members] for one in members]
        made: list[dict[int, float]] = []  # for each phi so far {member: factor}
        for index, member in enumerate(members):
            row = {index: 1.0}
            for earlier in made:
                product = _product(gram, row, earlier)
                for i, factor in earlier.items():
                    row[i] = row.get(i, 0.0) - product * factor
            left = _product(gram, row, row)
            if left <= _DEPENDENT * gram[index][index]:
                return None
            made.append({i: factor / math.sqrt(left) for i, factor in row.items()})
            for which, (j, sign) in enumerate(member):
                own = [m[which] for m in members]  # (j', sign) of each member
                phi[j] = {own[i][0]: sign * own[i][1] * factor for i, factor in made[-1].items()}
    return phi


def _mean_product(psi: list[list[float]], one: tuple[tuple[int, float], ...], other: tuple[tuple[int, float], ...]):
    """The inner product of two members of a family over the pixels, averaged over the group."""
    products = (
        v * w * a * b for (i, v), (j, w) in zip(one, other, strict=True) for a, b in zip(psi[i], psi[j], strict=True)
    )
    return math.fsum(products) / len(one)


def _product(gram: list[list[float]], row: dict[int, float], other: dict[int, float]) -> float:
    """The inner product of sums of members, given as {member: factor}."""
    return math.fsum(a * b * gram[i][j] for i, a in row.items() for j, b in other.items())


FOLDER = Path(__file__).parent


@cache
def manifest() -> dict[str, Any]:
    """Where the tables come from: escnn version, sha256, ring profiles, and the harmonics of every basis element."""
    return json.loads((FOLDER / "manifest.json").read_text())


def table_key(kernel: Kernel) -> str:
    """What a table of kernels of this group, size and type of input is called: 'd4/3x3/regular'."""
    return f"{kernel.group}/{kernel.size}x{kernel.size}/{kernel.input_type}"


def load_table(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """C [n_basis, J, H] and he_std [n_basis] of the kernels, float64, on the CPU; None where there is no table.

    Raises:
        RuntimeError: the table is not the one that the manifest describes.
    """
    key = table_key(kernel)
    if key not in manifest()["tables"] or kernel.low_pass:
        return None
    if kernel.rings != tuple(Ring(**ring) for ring in manifest()["rings"][str(kernel.size)]):
        return None
    coefficients, he_std = _tables()[f"{key}/coefficients"], _tables()[f"{key}/he_std"]
    found, expected = sha256(coefficients, he_std), manifest()["tables"][key]
    if found != expected:
        raise RuntimeError(
            f"the kernel basis {key} is damaged: sha256 {found}, expected {expected}; reinstall equivision-timm"
        )
    return coefficients, he_std


def sha256(*tensors: torch.Tensor) -> str:
    """Of the shapes and values of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


@constant
def _tables() -> dict[str, torch.Tensor]:
    return load((FOLDER / "tables.safetensors").read_bytes())
