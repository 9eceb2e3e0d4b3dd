"""The coordinate system of the weights: closed-form bases of the equivariant kernels.

A layer learns one weight for each pair of fields and each element of a kernel basis. The order, signs and scales of the
elements define what weights mean: for the kernels of published networks they are those of escnn 1.0.11, with which the
networks were trained; all other bases are orthonormal.

**The space.** A filter from fields of type `input` to regular fields commutes with the group exactly when

    K(x)[g, h] = k(g^-1 x, g^-1 h)                                  x: pixel; g: output, h: input element

(without h for trivial input), with any base kernel k(x, u). In x it is a sum of the functions psi_j of `kernels.py`. So
a basis element b is a matrix C[b] with k_b(x, u) = sum_j C[b, j, u] psi_j(x), and there are J * H elements.

**The elements.** With u = r^t f^p, theta = 2 pi t / N, s = 0 ... N - 1, and both signs for D_N, on one ring:

    cos(m phi + s theta) (+-1)^p,    sin(m phi + s theta) (+-1)^p

Such an element maps the irrep of frequency s of the input to that of frequency m + s of the output (modulo N, up to
sign). D_N has two irreps of frequency 0 and N / 2, which f multiplies by 1 and -1.

**The coordinates of escnn**, for c1, d1, c4, d4, c8, d8 with 1x1, 3x3 and, from images, 7x7 pixels:
- phi is measured from the y axis, so that f negates it;
- if rotations do not mix cos(m phi) and sin(m phi) (m = 2 in c4 and d4), elements between irreps of dimension 2 are the
  products of cos(m phi) or sin(m phi) with cos(s theta) or sin(s theta);
- the squared norm of K over g, h and the pixels is the dimension of the output irrep;
- the order is that of `_escnn_order`, the signs (`_escnn_sign`) are those of the intertwiners of escnn. For D_N escnn
  solves linear systems numerically, and the sign for each (m, input irrep, output irrep) depends on the machine; here
  they are those of SciPy 1.11 or newer without AVX-512 (`weights/signs.py` translates other ones).

**Orthonormal coordinates**, for all other kernels: phi is measured from the x axis, the rings are combined by
Gram-Schmidt from the centre outwards, the order is that of the loops in `elements`, and the norm of K is 1.

A low pass changes psi only. Initialisation is generalised He in both: all irreps that reach an irrep of the output
contribute the same variance to it, by equal shares of their elements.

Sources of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019); Weiler, Hamprecht and Storath,
Learning Steerable Filters for Rotation Equivariant CNNs (2018), for the initialisation.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from equivision_timm.constants import constant
from equivision_timm.groups import Group, circle
from equivision_timm.kernels import Harmonic, Kernel, harmonics, mixing, pixels

__all__ = ["Element", "KernelBasis", "elements", "initial_std", "load_kernel_basis", "sample_kernels"]

_DEPENDENT = 1e-6  # of the squared norm left by projection: 0.003 or more if independent, 1e-10 or less if dependent

Irrep = tuple[int, int]  # escnn's (j, k): k the frequency; j = 1 if f negates, or in D_N if the dimension is 2; else 0


@dataclass(frozen=True)
class KernelBasis:
    """A basis of `n_basis` equivariant kernels, float64, on the CPU.

    `he_std` is the standard deviation of a weight at initialisation for ONE input field: divide by the root of the
    number of input fields.
    """

    group: Group
    coefficients: torch.Tensor  # C [n_basis, J, H]; H = |G| for regular input, 1 for trivial input
    functions: torch.Tensor  # psi_j(g^-1 x) [|G|, J, k, k]
    he_std: torch.Tensor  # [n_basis]

    def sample(self) -> torch.Tensor:
        """K_b(x)[g, h] = sum_j C[b, j, g^-1 h] psi_j(g^-1 x) on the pixel grid: [n_basis, |G|, H, k, k]."""
        trivial = torch.zeros(self.group.order, 1, dtype=torch.int64)  # no h
        quotients = self.group.left_quotients() if self.coefficients.shape[2] > 1 else trivial
        return torch.einsum("bjgh,gjyx->bghyx", self.coefficients[:, :, quotients], self.functions)


@dataclass(frozen=True)
class Element:
    """A basis element: cos or sin of (m phi + s theta), or the product of cos or sin of each; (-1)^p times it."""

    harmonic: Harmonic  # the ring, and m
    rotation: int  # s
    sign: int  # 1 for the factor (-1)^p, else 0
    sine: int  # 0 for cos, 1 for sin
    theta: int | None  # of a product with cos(s theta) 0, with sin(s theta) 1; `sine` is then that of m phi
    in_irrep: Irrep
    out_irrep: Irrep

    @property
    def component(self) -> int:
        """The component of the output irrep of D_N, if of dimension 2; that of the input irrep is `sign`."""
        return (self.sine + self.sign + (self.theta or 0)) % 2


def elements(kernel: Kernel) -> list[Element]:
    """The basis elements, in the order of the weights."""
    group, escnn, found = Group.from_name(kernel.group), _has_escnn_coordinates(kernel), []
    n, regular = group.rotations, kernel.input_type == "regular"
    for harmonic in harmonics(kernel):
        m = harmonic.frequency
        for s in range(1) if not regular else range(n) if m else range(n // 2 + 1):
            product = escnn and m > 0 and 2 * m % n == 0 < 2 * s % n
            rotation, theta = (min(s, n - s), int(2 * s > n)) if product else (s, None)
            for sign in range(2 if regular and group.reflections else 1):
                for sine in range(1 if m == 0 and 2 * s % n == 0 else 2):  # sin is 0
                    negated = sign + sine + (0 if escnn else m)  # f maps phi to -phi, or to pi - phi
                    irreps = _irrep(group, s, sign), _irrep(group, m + s, negated)
                    found.append(Element(harmonic, rotation, sign, sine, theta, *irreps))
    return sorted(found, key=lambda element: _escnn_order(group, element)) if escnn else found


def _has_escnn_coordinates(kernel: Kernel) -> bool:
    size = kernel.size - 2 if kernel.low_pass else kernel.size
    default = replace(kernel, size=size, cutoff=None, low_pass=False)
    sizes = (1, 3, 7) if kernel.input_type == "trivial" else (1, 3)
    return kernel.group in ("c1", "d1", "c4", "d4", "c8", "d8") and size in sizes and kernel.rings == default.rings


def _irrep(group: Group, frequency: int, negated: int) -> Irrep:
    """The irrep of a rotation frequency; `negated`: whether f negates it (for dimension 1)."""
    k = min(frequency % group.rotations, -frequency % group.rotations)
    if not group.reflections:
        return 0, k
    return (negated % 2 if 2 * k % group.rotations == 0 else 1), k


def _escnn_order(group: Group, element: Element) -> tuple[float, ...]:
    """Sort key: m, input irrep and component, output irrep, component, ring."""
    irreps = [(k, -j if 2 * k == group.rotations else j) for j, k in (element.in_irrep, element.out_irrep)]
    index = (element.component, -element.sine) if group.reflections else (element.theta or 0, element.sine)
    return element.harmonic.frequency, *irreps[0], element.sign, *irreps[1], *index, element.harmonic.ring.radius


def _escnn_sign(group: Group, element: Element) -> int:
    """The sign of an element as escnn computes it.

    C_N: of a pair of intertwiners K and iK. D_N: the elements are the entries [b, a] of the matrices below, of the
    angle m phi + s theta; e_in and e_out are the signs of the frequencies s and m + s, taken from -N / 2 to N / 2.
    """
    n, m, s = group.rotations, element.harmonic.frequency, element.rotation
    out, a, b = (m + s) % n, element.sign, element.component
    if not group.reflections:
        return -1 if element.sine and (m == 0 or 2 * (m % n) > n) else 1
    if element.theta is not None:  # cos(m phi) [[-cos, sin], [sin, cos]], sin(m phi) [[sin, cos], [cos, -sin]]
        return -1 if a == b == element.sine else 1
    if 2 * m % n == 0 == 2 * s % n:  # irreps of dimension 1
        return 1
    e_in, e_out = (-1 if 2 * s >= n else 1), (-1 if 2 * out > n else 1)
    e_in, e_out = e_out if s == 0 else e_in, e_in if out == 0 else e_out
    entry = ((1, -e_in), (e_out, e_in * e_out))[b][a]  # [[cos, -e_in sin], [e_out sin, e_in e_out cos]]
    return -entry if m == 0 or e_in != e_out or n in (2 * s, 2 * out) else entry  # as escnn's solver


def _closed_form(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """C [n_basis, J, H] and he_std [n_basis], float64, of a kernel without low pass."""
    group, found, escnn = Group.from_name(kernel.group), elements(kernel), _has_escnn_coordinates(kernel)
    u = torch.arange(group.order if kernel.input_type == "regular" else 1)
    p, t = u // group.rotations, u % group.rotations
    waves = torch.tensor(circle(group.rotations), dtype=torch.float64)  # [N, 2]
    gram = _gram(kernel)
    rows = torch.zeros(len(found), len(gram), len(u), dtype=torch.float64)  # in terms of cos and sin of m phi
    for row, element in zip(rows, found, strict=True):
        sign = (1 - 2 * p * element.sign) * (_escnn_sign(group, element) if escnn else 1)
        cos, sin = waves[element.rotation * t % group.rotations].T * sign  # of s theta: [H]
        js = element.harmonic.js
        if element.theta is not None:
            row[js[element.sine]] = sin if element.theta else cos
        else:
            row[js] = torch.stack((sin, cos) if element.sine else (cos, -sin))[: len(js)]
    # cos and sin of m (phi - 90 degrees) are psi(r^-1 x), r a quarter turn
    functions = mixing(replace(kernel, group="c4"))[1] if escnn else _gram_schmidt(kernel, gram)
    coefficients = torch.einsum("biu,ij->bju", rows, functions)

    sizes = [1 if 2 * e.out_irrep[1] % group.rotations == 0 else 2 for e in found]
    dimensions = torch.tensor(sizes, dtype=torch.float64)
    squared = dimensions if escnn else torch.ones_like(dimensions)  # norm of K
    scales = squared / torch.einsum("biu,ij,bju->b", coefficients, gram, coefficients)

    pairs = Counter((e.in_irrep, e.out_irrep) for e in found)
    inputs = Counter(out_irrep for _, out_irrep in pairs)  # the number of irreps that reach it
    shares = [inputs[e.out_irrep] * pairs[e.in_irrep, e.out_irrep] for e in found]
    channels = dimensions ** (2 if group.reflections else 1)  # of an irrep in a regular field
    he_std = (channels / (torch.tensor(shares, dtype=torch.float64) * squared)).sqrt()
    return coefficients * scales.sqrt()[:, None, None], he_std


def _gram(kernel: Kernel) -> torch.Tensor:
    """Inner products [J, J] of the functions psi over the pixels, summed over the group."""
    moved = torch.einsum("gij,jx->gix", mixing(kernel), pixels(kernel).flatten(1))
    return torch.einsum("gix,gjx->ij", moved, moved)


def _gram_schmidt(kernel: Kernel, gram: torch.Tensor) -> torch.Tensor:
    """R [J, J], lower triangular, phi = R psi orthonormal; joins only functions that the group transforms alike."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or (factor.diagonal() ** 2 <= _DEPENDENT * gram.diagonal()).any():
        raise ValueError(
            f"cutoff {kernel.cutoff} is too high for {kernel.size}x{kernel.size} kernels of {kernel.group}: functions "
            "of high frequency depend on the others on so few pixels; use a smaller one"
        )
    r = torch.linalg.inv(factor)
    return torch.where(r.abs() < 1e-12, 0.0, r)


@constant
def load_kernel_basis(kernel: Kernel) -> KernelBasis:
    """The basis of the kernels; if they have a low pass, with the coefficients of the kernels before it."""
    unfiltered = replace(kernel, size=kernel.size - 2, low_pass=False) if kernel.low_pass else kernel
    coefficients, he_std = _closed_form(unfiltered)
    functions = torch.einsum("gij,jyx->giyx", mixing(kernel), pixels(kernel))
    return KernelBasis(Group.from_name(kernel.group), coefficients, functions, he_std)


@constant
def sample_kernels(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`KernelBasis.sample`, [n_basis, |G|, H, k, k]; not to be changed in place."""
    return load_kernel_basis(kernel).sample().to(device, dtype)


@constant
def initial_std(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`KernelBasis.he_std`, [n_basis]; not to be changed in place."""
    return load_kernel_basis(kernel).he_std.to(device, dtype)
