"""Which signs of a D_4 or D_8 kernel basis depend on the machine, and the patterns seen on real machines.

escnn finds the Clebsch-Gordan coefficients of D_N as the null space of a linear system, one for each triple (harmonic
J, input irrep, output irrep), and the sign of a null vector depends on the linear-algebra library. So all basis
elements of one triple share a sign, in every kernel (1x1, 3x3, 7x7) and every layer: a sign group. Where a harmonic
of O(2) splits under D_N (frequency N / 2, so frequency 2 in D_4), its cosine and its sine are two irreps and give two
groups. C_N and D_1 have closed forms: no groups.

A pattern is a string of '+' and '-', one for each sign group in the order of `sign_groups`; '-' means that the
machine's basis elements are the negatives of ours (`kernel_basis.py`).
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis, manifest, table_key
from equivision_timm.kernels import Kernel

__all__ = ["SignGroup", "element_signs", "half_turn", "irrep_flips", "known_patterns", "parse_signs", "sign_groups"]


@dataclass(frozen=True)
class SignGroup:
    """The basis elements that share a sign.

    Attributes:
        harmonic: J, and 'cos' or 'sin' where it splits.
        in_irrep: irrep of the input field.
        out_irrep: irrep of the output field.
        frequency: angular frequency of J; odd ones change sign under the half turn.
        elements: (basis key such as 'd4/3x3/regular', element index).
    """

    harmonic: str
    in_irrep: str
    out_irrep: str
    frequency: int
    elements: tuple[tuple[str, int], ...]


@cache
def sign_groups(group_name: str) -> tuple[SignGroup, ...]:
    """The sign groups of `group_name`: 24 for D_4, 32 for D_8, none for groups whose bases are the same everywhere."""
    group = Group.from_name(group_name)
    if not group.reflections or group.rotations == 1:
        return ()
    members: dict[tuple[str, str, str, int], list[tuple[str, int]]] = {}
    for kernel in _kernels(group_name):
        key, sines = table_key(kernel), _sine_elements(kernel)
        for index, element in enumerate(manifest()["elements"][key]):
            harmonic, frequency = element["J"], element["frequency"]
            if frequency and 2 * frequency % group.rotations == 0:
                harmonic += " sin" if sines[index] else " cos"
            triple = (harmonic, element["in_irrep"], element["out_irrep"], frequency)
            members.setdefault(triple, []).append((key, index))
    return tuple(SignGroup(*triple, tuple(elements)) for triple, elements in members.items())


def _kernels(group_name: str) -> list[Kernel]:
    """Those of the networks."""
    return [Kernel(group_name, 1), Kernel(group_name, 3), Kernel(group_name, 7, "trivial")]


def _sine_elements(kernel: Kernel) -> list[bool]:
    """For each basis element, whether its base kernel consists of sines, which reflection up and down negates."""
    kernels = load_kernel_basis(kernel).sample()[:, 0]  # [n_basis, H, k, k]
    return [torch.allclose(kernel.flip(-2), -kernel, atol=1e-5) for kernel in kernels]


def half_turn(group_name: str) -> str:
    """The pattern that negates every odd harmonic: it turns all kernels by 180 degrees and leaves the logits."""
    return "".join("-" if group.frequency % 2 else "+" for group in sign_groups(group_name))


def irrep_flips(group_name: str) -> list[str]:
    """For each irrep but the trivial one, the pattern that negates its features: the groups that enter or leave it.

    With all features of one irrep negated, every linear map is unchanged; the ReLU alone tells. These patterns are
    the deep local optima of the search in `signs.py`.
    """
    groups = sign_groups(group_name)
    irreps = sorted({group.out_irrep for group in groups} - {"(0, 0)"})
    return [
        "".join("-" if (group.in_irrep == irrep) != (group.out_irrep == irrep) else "+" for group in groups)
        for irrep in irreps
    ]


def parse_signs(group_name: str, signs: str) -> str:
    """The pattern called `signs`: a name of `known_patterns`, or itself where it is a string of '+' and '-'.

    Raises:
        ValueError: neither of them, or a group whose basis has no signs to choose.
    """
    known, count = known_patterns(group_name), len(sign_groups(group_name))
    if not count:
        raise ValueError(f"the basis of {group_name} is the same on every machine: leave signs={signs!r} out")
    pattern = known.get(signs, signs)
    if len(pattern) != count or set(pattern) - {"+", "-"}:
        raise ValueError(
            f"signs={signs!r} is no sign pattern of {group_name}: use one of {', '.join(known)}, "
            f"or {count} characters '+' or '-'"
        )
    return pattern


def element_signs(group_name: str, signs: str) -> dict[str, torch.Tensor]:
    """{basis key: [n_basis] float32 of +1 and -1} of a pattern."""
    pattern = parse_signs(group_name, signs)
    result = {}
    for key in map(table_key, _kernels(group_name)):
        result[key] = torch.ones(len(manifest()["elements"][key]))
    for sign, group in zip(pattern, sign_groups(group_name), strict=True):
        for key, index in group.elements:
            result[key][index] = 1.0 if sign == "+" else -1.0
    return result


@cache
def known_patterns(group_name: str) -> dict[str, str]:
    """{name: pattern} of the patterns measured with escnn 1.0.11 on real machines, the likeliest first.

    Names say where: 'scipy1.11-avx2', for example, covers SciPy 1.11 and newer on processors without AVX-512.
    Machines that agree in this group's signs share one entry, under the first name.
    """
    table = json.loads((resources.files("equivision_timm.weights.equivision") / "sign_patterns.json").read_text())
    groups, patterns = sign_groups(group_name), {}
    for name, negated in table["patterns"].items():
        elements = {key: set(indices) for key, indices in negated.items()}
        signs = ["-" if group.elements[0][1] in elements.get(group.elements[0][0], ()) else "+" for group in groups]
        if groups and "".join(signs) not in patterns.values():
            patterns[name] = "".join(signs)
    return patterns
