"""Signs of D4 and D8 kernel bases, which depend on the machine, and the patterns known of real machines.

escnn computes the Clebsch-Gordan coefficients of D_N as the null space of a linear system for each triple (harmonic J,
input irrep, output irrep). The sign of a null vector depends on the linear-algebra library. All basis elements of one
triple share a sign in every kernel size and layer: a sign group. If a harmonic of O(2) splits under D_N (frequency
N / 2: 2 in D_4), its cosine and its sine are two irreps and give two groups. C_N and D_1 have closed forms: no groups.

A pattern is a string of '+' and '-', one for each sign group in the order of `sign_groups`; '-' means that the basis
elements of that machine are the negatives of those of this package.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from equivision_timm.errors import InputError
from equivision_timm.groups import Group
from equivision_timm.kernel_basis import elements
from equivision_timm.kernels import Kernel

__all__ = ["combine", "element_signs", "half_turn", "known_patterns", "neighbours", "parse_signs", "sign_groups"]


class SignGroup(NamedTuple):
    """Basis elements that share a sign."""

    frequency: int  # angular frequency of J
    part: str  # 'cos' or 'sin' if J splits, else ''
    in_irrep: tuple[int, int]
    out_irrep: tuple[int, int]


@cache
def sign_groups(group_name: str) -> tuple[SignGroup, ...]:
    """Sign groups: 24 for 'd4', 32 for 'd8', none for groups whose bases do not depend on the machine."""
    group = Group.from_name(group_name)
    if not group.reflections or group.rotations == 1:
        return ()
    kernels = Kernel(group_name, 1), Kernel(group_name, 3), Kernel(group_name, 7, "trivial")
    return tuple(dict.fromkeys(found for kernel in kernels for found in _groups_of_elements(kernel)))


@cache
def _groups_of_elements(kernel: Kernel) -> list[SignGroup]:
    """The sign group of each basis element of a kernel."""
    n, found = Group.from_name(kernel.group).rotations, []
    for element in elements(kernel):
        m = element.harmonic.frequency
        part = ("sin" if element.sine else "cos") if m and 2 * m % n == 0 else ""
        found.append(SignGroup(m, part, element.in_irrep, element.out_irrep))
    return found


@cache
def known_patterns(group_name: str) -> dict[str, str]:
    """{name: pattern} measured with escnn 1.0.11 on real machines, the likeliest first."""
    return json.loads(Path(__file__).with_name("sign_patterns.json").read_text(encoding="utf-8")).get(group_name, {})


def parse_signs(group_name: str, signs: str) -> str:
    """The pattern of a name of `known_patterns` or of a string of '+' and '-'; raises InputError for anything else."""
    known, count = known_patterns(group_name), len(sign_groups(group_name))
    pattern = known.get(signs, signs)
    if not count or len(pattern) != count or set(pattern) - {"+", "-"}:
        patterns = f"use {', '.join(known)}, or {count} of '+' and '-'" if count else "there are none, leave it out"
        raise InputError(f"signs={signs!r} is not a pattern of {group_name}: {patterns}")
    return pattern


def element_signs(kernel: Kernel, signs: str) -> torch.Tensor:
    """[n_basis, 1] float32 of +1 and -1: the signs of the basis elements of a kernel under a pattern."""
    sign_of = dict(zip(sign_groups(kernel.group), parse_signs(kernel.group, signs), strict=True))
    return torch.tensor([[1.0 if sign_of[group] == "+" else -1.0] for group in _groups_of_elements(kernel)])


def combine(a: str, b: str) -> str:
    """Product of two patterns."""
    return "".join("+" if x == y else "-" for x, y in zip(a, b, strict=True))


def half_turn(group_name: str) -> str:
    """Pattern that negates every odd harmonic. It rotates all kernels by 180 degrees, which leaves the logits."""
    return "".join("-" if group.frequency % 2 else "+" for group in sign_groups(group_name))


def neighbours(group_name: str) -> list[str]:
    """Patterns that change one sign group, and those that negate the features of one irrep.

    Negating all features of an irrep leaves every linear map unchanged; only the ReLU distinguishes the networks. These
    are the deep local optima of a search for signs.
    """
    groups = sign_groups(group_name)
    singles = ["+" * i + "-" + "+" * (len(groups) - i - 1) for i in range(len(groups))]
    irreps = sorted({group.out_irrep for group in groups} - {(0, 0)})
    return singles + [
        "".join("-" if (group.in_irrep == irrep) != (group.out_irrep == irrep) else "+" for group in groups)
        for irrep in irreps
    ]
