"""What kernels do between irreps."""

import torch

from equivision_timm.groups import Group


def irrep_energy(kernel, kernels):
    """Squared norms of kernels [b, |G|, H, k, k] between the isotypic parts of output and input: [out, in, b]."""
    group = Group.from_name(kernel.group)
    q, sizes = group.fourier_matrix(), [size * copies for size, copies in group.irreps()]
    kernels, inputs = torch.einsum("rg,bghyx->brhyx", q, kernels), [1]
    if kernel.input_type == "regular":
        kernels, inputs = torch.einsum("sh,brhyx->brsyx", q, kernels), sizes
    rows = [part.split(inputs, 2) for part in kernels.split(sizes, 1)]
    return torch.stack([torch.stack([part.square().sum((1, 2, 3, 4)) for part in row]) for row in rows]), sizes
