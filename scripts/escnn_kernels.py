"""Kernel bases as escnn computes them on this machine, for comparison with `equivision_timm.kernel_basis`."""

from typing import Any

import torch

from equivision_timm.escnn_interop import field_type, gspace, import_escnn
from equivision_timm.kernels import Kernel


def sample_kernels(kernel: Kernel) -> dict[str, Any]:
    """escnn's own basis of the kernels from one field to one regular field.

    Returns:
        kernels: [n_basis, |G|, H, k, k] float32. he_std: [n_basis] float32. elements: for each basis element, its
        harmonic J, ring radius, angular frequency, input and output irrep. rings: for each ring its radius, sigma
        and largest frequency.

    Raises:
        ValueError: the kernels have a low pass, which escnn does not know. ImportError: the extra is not installed.
    """
    if kernel.low_pass:
        raise ValueError(f"escnn has no kernels with a low pass, as {kernel.name}: use low_pass=False")
    escnn = import_escnn()
    space = gspace(kernel.group)
    in_repr = space.trivial_repr if kernel.input_type == "trivial" else space.regular_repr
    in_type, out_type = escnn.nn.FieldType(space, [in_repr]), field_type(kernel.group, 1)
    cutoff = None if kernel.cutoff is None else float(kernel.cutoff)
    conv = escnn.nn.R2Conv(in_type, out_type, kernel.size, frequencies_cutoff=cutoff, bias=False, initialize=False)
    kernels = torch.stack([conv.basisexpansion(row) for row in torch.eye(conv.weights.numel())])
    he_std = escnn.nn.init._generalized_he_init_variances(conv.basisexpansion)  # the roots, despite the name
    info = list(conv.basisexpansion.get_basis_info())
    elements = [
        {
            "J": str(attribute["j"]),
            "radius": float(attribute["radius"]),
            "frequency": int(attribute["irrep:frequency"]),
            "in_irrep": str(attribute["in_irrep"]),
            "out_irrep": str(attribute["out_irrep"]),
        }
        for attribute in info
    ]
    rings = [
        {
            "radius": float(radius),
            "sigma": float(sigma),
            "max_frequency": max(element["frequency"] for element in elements if element["radius"] == float(radius)),
        }
        for radius, sigma in zip(conv._rings, conv._sigma, strict=True)
    ]
    shape = (len(info), out_type.size, in_type.size, kernel.size, kernel.size)
    return {"kernels": kernels.detach().view(shape), "he_std": he_std, "elements": elements, "rings": rings}
