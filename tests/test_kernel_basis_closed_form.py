"""The closed form: equivariant, orthonormal, the right size and variance, and the same wherever it is computed."""

import hashlib
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support.reference_data import FOLDER

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import KernelBasis, closed_form, load_kernel_basis
from equivision_timm.kernels import Kernel, harmonics, mix, pixels

KERNELS = [
    Kernel(group, size, input_type, cutoff)
    for group in ("c3", "c6", "c16", "d6", "d16")
    for size, input_type, cutoff in (
        (1, "regular", None),
        (1, "trivial", 2),
        (3, "regular", None if group != "d16" else 1),
        (3, "regular", 2),
        (3, "trivial", 3),
        (5, "regular", 3) if group in ("c3", "c6") else (3, "regular", 3),
        (5, "trivial", None),
        (7, "regular", 2) if group == "c3" else (7, "trivial", 2),
        (7, "trivial", 3),
    )
]
by_name = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def closed_basis(kernel):
    coefficients, he_std = closed_form(kernel)
    return KernelBasis(Group.from_name(kernel.group), coefficients, mix(kernel, pixels(kernel)), he_std)


def equivariance_error(kernel, kernels):
    """Largest violation of K(g x)[g a, g b] = K(x)[a, b], over the symmetries of the pixel grid."""
    group = Group.from_name(kernel.group)
    quotients, error = group.left_quotients(), 0.0
    for g in group.grid_elements:
        moved = group.transform_image(kernels, g)[:, quotients[g]]
        if kernel.input_type == "regular":
            moved = moved[:, :, quotients[g]]
        error = max(error, (moved - kernels).abs().max().item())
    return error


@by_name
def test_equivariant_orthonormal_and_complete(kernel):
    basis, group = closed_basis(kernel), Group.from_name(kernel.group)
    kernels = basis.sample()
    functions = sum(1 if harmonic.sin is None else 2 for harmonic in harmonics(kernel))
    count = functions * (group.order if kernel.input_type == "regular" else 1)
    assert len(kernels) == len(basis.he_std) == count
    gram = kernels.flatten(1) @ kernels.flatten(1).T
    assert (gram - torch.eye(count, dtype=torch.float64)).abs().max() < 1e-12
    assert equivariance_error(kernel, kernels) < 1e-12
    if len(group.grid_elements) > 1:  # the controls: two input channels swapped, or pixels moved
        swapped = kernels.clone()
        swapped[:, :, :2] = kernels[:, :, :2].flip(2)
        assert equivariance_error(kernel, swapped) > 0.01 or kernel.input_type == "trivial"
        assert equivariance_error(kernel, kernels.roll(1, 3)) > 0.01 or kernel.size == 1


@by_name
def test_an_element_maps_one_irrep_to_one(kernel):
    # Where an output irrep is reached at all, its channels get the variance 1 each, from all input irreps alike
    basis, group = closed_basis(kernel), Group.from_name(kernel.group)
    q, irreps = group.fourier_matrix(), [size * copies for size, copies in group.irreps()]
    kernels = torch.einsum("rg,bghyx->brhyx", q, basis.sample())
    inputs = [1]
    if kernel.input_type == "regular":
        kernels, inputs = torch.einsum("sh,brhyx->brsyx", q, kernels), irreps
    shares = [part.split(inputs, 2) for part in kernels.split(irreps, 1)]
    energy = torch.stack([torch.stack([s.square().sum((1, 2, 3, 4)) for s in row]) for row in shares])  # [out, in, b]
    torch.testing.assert_close(energy.amax((0, 1)), torch.ones(len(kernels)).double())  # all of it in one place
    variance = energy @ basis.he_std.square()  # [out, in]
    reached = variance > 1e-9
    expected = torch.tensor(irreps).double()[:, None] * reached / reached.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(variance, expected)
    assert reached.any()


def test_wrong_coordinates_are_seen():
    basis = closed_basis(Kernel("d6", 3))
    q = Group.from_name("d6").fourier_matrix()
    mixed = (basis.coefficients[[0, 5]] + basis.coefficients[[1, 20]]) / math.sqrt(2)
    kernels = KernelBasis(basis.group, mixed, basis.functions, basis.he_std[:2]).sample()
    kernels = torch.einsum("rg,bghyx,sh->brsyx", q, kernels, q)
    sizes = [size * copies for size, copies in Group.from_name("d6").irreps()]
    blocks = [block.square().sum((1, 2, 3, 4)) for row in kernels.split(sizes, 1) for block in row.split(sizes, 2)]
    assert torch.stack(blocks).amax(0).max() < 0.9


@pytest.mark.parametrize("key", ["1x1/regular", "3x3/regular", "7x7/trivial"])
def test_kernels_of_reresnet(key):
    # e2cnn 0.2.3, cut-off 3 r: the same space, in other coordinates
    theirs = load_file(FOLDER / "reresnet" / "bases.safetensors")[f"c8/{key}"].double().flatten(1)
    ours = closed_basis(Kernel("c8", int(key[0]), key[4:], 3)).sample().flatten(1)
    assert ours.shape == theirs.shape
    assert torch.linalg.matrix_rank(theirs, rtol=1e-4) == len(theirs)
    assert (theirs - theirs @ ours.T @ ours).abs().max() < 1e-6
    if key[0] != "1":  # fewer frequencies miss some
        fewer = closed_basis(Kernel("c8", int(key[0]), key[4:], 2)).sample().flatten(1)
        assert (theirs - theirs @ fewer.T @ fewer).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (Kernel("c8", 3, cutoff=4), r"cutoff 4 does not fit 3x3 kernels of c8: .*; use cutoff 3, or less"),
        (Kernel("c4", 5, cutoff=9), r"cutoff 9 does not fit 5x5 kernels of c4: .*; use cutoff 3, or less"),
        (Kernel("d8", 7, "trivial", 6), r"cutoff 6 does not fit 7x7 kernels of d8: .*; use cutoff 3, or less"),
    ],
)
def test_functions_that_so_few_pixels_cannot_tell_apart(kernel, message):
    with pytest.raises(ValueError, match=message):
        load_kernel_basis(kernel)


def test_fine_rotations_tell_more_functions_apart():
    # sin(4 phi) vanishes on 3 x 3 pixels and on those rotated by 45 degrees, but not by 22.5
    assert len(load_kernel_basis(Kernel("c16", 3, cutoff=4)).he_std) == 16 * 10


def test_the_default_and_small_cut_offs_always_fit():
    for size in (1, 3, 5, 7, 9, 11):
        for cutoff in (None, 1, 2, 3):
            closed_form(Kernel("c4", size, "trivial", cutoff))


def test_it_takes_milliseconds():
    def seconds():
        start = time.process_time()
        closed_basis(Kernel("c16", 5))
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.1


MACHINES = [
    {
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Haswell"},
]


def fingerprint():
    """sha256 of some bases, with a table and in closed form: their coefficients, functions and sampled kernels."""
    digest = hashlib.sha256()
    for name in ("d4-3-regular", "c8-7-trivial", "c3-5-regular-3", "c16-5-regular-low", "d6-3-regular-3"):
        basis = load_kernel_basis(Kernel.from_name(name))
        for tensor in (basis.coefficients, basis.functions, basis.he_std, basis.sample()):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_the_same_to_the_last_bit_with_other_instructions_and_threads():
    code = "from test_kernel_basis_closed_form import fingerprint; print(fingerprint())"
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([tests, os.path.dirname(tests), *filter(None, sys.path)])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, **machine},
            stdout=subprocess.PIPE,
            text=True,
        )
        for machine in MACHINES
    ]
    found = {run.communicate()[0].strip() for run in runs}
    assert not any(run.returncode for run in runs)
    assert found == {fingerprint()} == {RECORDED}


RECORDED = "671d7bdae7fec7b32b6139c176ac70e6f874209b1bcc91f521f4c511f987420b"  # on Linux, x86-64
