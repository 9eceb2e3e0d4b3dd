"""Kernel bases computed by escnn on this machine, for comparison with `equivision_timm.kernel_basis`.

    python scripts/escnn_kernels.py d4-3-regular

prints the elements with the opposite sign (D_N). If scikit-learn is installed, escnn draws random signs.
"""

import sys
from typing import Any

import torch

from equivision_timm.escnn_interop import field_type, gspace, import_escnn
from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.kernels import Kernel


def sample_kernels(kernel: Kernel) -> dict[str, Any]:
    """escnn's basis of the kernels from one field to one regular field, without low pass.

    Returns:
        kernels: [n_basis, |G|, H, k, k] float32. he_std: [n_basis] float32. elements: for each basis element its
        frequency, ring radius, input and output irrep. rings: (radius, sigma) of each ring.
    """
    assert not kernel.low_pass
    nn, space = import_escnn().nn, gspace(kernel.group)
    in_repr = space.trivial_repr if kernel.input_type == "trivial" else space.regular_repr
    in_type, out_type = nn.FieldType(space, [in_repr]), field_type(kernel.group, 1)
    cutoff = None if kernel.cutoff is None else float(kernel.cutoff)
    conv = nn.R2Conv(in_type, out_type, kernel.size, frequencies_cutoff=cutoff, bias=False, initialize=False)
    kernels = torch.stack([conv.basisexpansion(row) for row in torch.eye(conv.weights.numel())])
    elements = [
        [int(info["irrep:frequency"]), float(info["radius"]), str(info["in_irrep"]), str(info["out_irrep"])]
        for info in conv.basisexpansion.get_basis_info()
    ]
    return {
        "kernels": kernels.detach().view(len(elements), out_type.size, in_type.size, kernel.size, kernel.size),
        "he_std": nn.init._generalized_he_init_variances(conv.basisexpansion),  # the roots, despite the name
        "elements": elements,
        "rings": [(float(radius), float(sigma)) for radius, sigma in zip(conv._rings, conv._sigma, strict=True)],
    }


def signs(kernel: Kernel, found: torch.Tensor) -> torch.Tensor:
    """[n_basis] of +1 and -1, the sign of escnn's kernels relative to this package's, which otherwise must agree."""
    expected = load_kernel_basis(kernel).sample()
    result = torch.sign((found * expected).flatten(1).sum(1))
    error = (found * result.view(-1, 1, 1, 1, 1) - expected).abs().max().item()
    assert error < 1e-6, f"the kernels differ by {error:.1e}, not only by signs"
    return result


if __name__ == "__main__":
    for name in sys.argv[1:]:
        negated = (signs(Kernel.from_name(name), sample_kernels(Kernel.from_name(name))["kernels"]) < 0).nonzero()
        print(f"{name}: opposite signs in elements {negated.flatten().tolist()}")
