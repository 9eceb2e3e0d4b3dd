"""The frozen kernel bases, in factored form.

A filter that maps fields of type `input` to regular fields commutes with the group exactly when

    K(x)[g, h] = k(g^-1 x, g^-1 h)                                     x: pixel, g: output, h: input element

(for trivial input there is no h). On a k x k grid the base kernel k is spanned by a few functions psi_j of the plane
in closed form, so one basis element b is a small matrix of coefficients:

    k_b(x, h) = sum_j C[b, j, h] psi_j(x)
    psi_j(x)  = exp(-(|x| - radius)^2 / (2 sigma^2)) cos(frequency phi)     or sin in place of cos

Source of the maths: Weiler and Cesa, General E(2)-Equivariant Steerable CNNs (2019); Cohen and Welling, Group
Equivariant Convolutional Networks (2016). The coefficients were sampled once from escnn, whose D_4 and D_8 bases
change sign with the linear-algebra library of the machine; here they are data (`tables.safetensors`), with their
origin, ring profiles and sha256 in `manifest.json`, so that a weight means the same network everywhere.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load

from equivision_timm.constants import constant
from equivision_timm.groups import Group

__all__ = ["KernelBasis", "Ring", "initial_std", "load_kernel_basis", "manifest", "sample_functions", "sample_kernels"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Ring:
    """Profile of the functions on one ring: `radius` and `sigma` in pixels, frequencies 0 ... `max_frequency`."""

    radius: float
    sigma: float
    max_frequency: int


@dataclass(frozen=True)
class KernelBasis:
    """One frozen basis: `n_basis` equivariant kernels, float64, on the CPU.

    Attributes:
        group: the group it commutes with.
        coefficients: C [n_basis, J, H]; H = |G| for regular input, 1 for trivial input.
        functions: psi_j(g^-1 x) [|G|, J, k, k], the spatial functions moved by every group element.
        he_std: [n_basis], the standard deviation of a coefficient at initialisation for ONE input field: divide by
            the root of the number of input fields (generalised He initialisation, Weiler and Cesa 2018).
    """

    group: Group
    coefficients: torch.Tensor
    functions: torch.Tensor
    he_std: torch.Tensor

    def sample(self) -> torch.Tensor:
        """The kernels on the pixel grid, [n_basis, |G|, H, k, k]; `sample_kernels` does it once for all callers.

        K_b(x)[g, h] = k_b(g^-1 x, g^-1 h) = sum_j C[b, j, g^-1 h] psi_j(g^-1 x)
        """
        if self.coefficients.shape[-1] == 1:  # trivial input: no h, C[b, j] for every g
            moved = self.coefficients[:, :, None, :].expand(-1, -1, self.group.order, -1)
        else:
            moved = self.coefficients[:, :, self.group.left_quotients()]  # [n_basis, J, |G|, H]
        return torch.einsum("bjgh,gjyx->bghyx", moved, self.functions)


def sample_functions(group: Group, kernel_size: int, rings: tuple[Ring, ...]) -> torch.Tensor:
    """psi_j(g^-1 x) on the k x k pixel grid, for every element g: [|G|, J, k, k], float64.

    The order of j: ring by ring, frequency by frequency, cosine before sine. x points right, y points up; the angle
    of the centre pixel counts as 0, where every function of non-zero frequency vanishes.
    """
    offsets = torch.arange(kernel_size, dtype=torch.float64, device="cpu") - (kernel_size - 1) / 2
    y, x = torch.meshgrid(-offsets, offsets, indexing="ij")
    distance, angle = torch.hypot(x, y), torch.atan2(y, x)

    def at(angles: torch.Tensor) -> torch.Tensor:
        rows = []
        for ring in rings:
            profile = torch.exp(-((distance - ring.radius) ** 2) / (2 * ring.sigma**2))
            rows.append(profile)
            for frequency in range(1, ring.max_frequency + 1):
                off_centre = profile * (distance > 0)
                rows.append(off_centre * torch.cos(frequency * angles))
                rows.append(off_centre * torch.sin(frequency * angles))
        return torch.stack(rows)  # [J, k, k]

    return torch.stack([at(group.inverse_angle(g, angle)) for g in range(group.order)])


@cache
def manifest() -> dict:
    """Where the tables come from: escnn version, sha256, ring profiles, and the harmonics of every basis element."""
    return json.loads((FOLDER / "manifest.json").read_text())


@constant
def load_kernel_basis(group_name: str, kernel_size: int, input_type: str) -> KernelBasis:
    """The frozen basis of k x k kernels from `input_type` ('regular' or 'trivial') to regular fields.

    Raises:
        ValueError: no such basis was frozen.
        RuntimeError: the tables are not the ones the manifest describes.
    """
    key = f"{group_name}/{kernel_size}x{kernel_size}/{input_type}"
    tables = _tables()
    if f"{key}/coefficients" not in tables:
        frozen = sorted(name.removesuffix("/coefficients") for name in tables if name.endswith("/coefficients"))
        raise ValueError(f"no frozen kernel basis {key!r}: the package carries {', '.join(frozen)}")
    group = Group.from_name(group_name)
    rings = tuple(Ring(**ring) for ring in manifest()["rings"][str(kernel_size)])
    return KernelBasis(
        group=group,
        coefficients=tables[f"{key}/coefficients"],
        functions=sample_functions(group, kernel_size, rings),
        he_std=tables[f"{key}/he_std"],
    )


@constant
def sample_kernels(
    group_name: str, kernel_size: int, input_type: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The kernels of `load_kernel_basis` on the pixel grid, [n_basis, |G|, H, k, k]; not to be changed in place."""
    return load_kernel_basis(group_name, kernel_size, input_type).sample().to(device, dtype)


@constant
def initial_std(
    group_name: str, kernel_size: int, input_type: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The `he_std` [n_basis] of `load_kernel_basis`; not to be changed in place."""
    return load_kernel_basis(group_name, kernel_size, input_type).he_std.to(device, dtype)


@constant
def _tables() -> dict[str, torch.Tensor]:
    content = (FOLDER / "tables.safetensors").read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), manifest()["sha256"]
    if found != expected:
        raise RuntimeError(
            f"kernel basis tables are damaged: sha256 {found}, the manifest says {expected}; reinstall equivision-timm"
        )
    return load(content)
