"""Coefficients in the basis of a foreign checkpoint -> coefficients in ours."""

import torch

__all__ = ["solve", "translate_basis"]

_TOLERANCE = 1e-4  # of least-squares residuals, relative to the largest value; float32 leaves 1e-6


def translate_basis(source: torch.Tensor, target: torch.Tensor, name: str) -> tuple[torch.Tensor, float]:
    """T [n_basis, n_basis] with T target = source, so that w T are coefficients in `target`; and the relative residual.

    Args:
        source: kernels [n_basis, |G|, H, ...].
        target: the same kernels in another basis.
        name: of the convolution, for the error.

    Raises:
        ValueError: the two do not span the same kernels.
    """
    translation, residual = solve(source.double().flatten(1), target.double().flatten(1), name, source.dtype)
    rank = torch.linalg.matrix_rank(translation, rtol=1e-3).item()
    if rank < len(source):
        raise ValueError(
            f"the sampled_basis of {name} has {len(source)} kernels, but only {rank} independent ones: it is damaged"
        )
    signs = translation.round()  # bases of escnn differ in signs: no rounding errors then
    return (signs if torch.allclose(translation, signs, rtol=0, atol=1e-5) else translation), residual


def solve(rows: torch.Tensor, basis: torch.Tensor, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """X [n, n_basis] with X basis = rows [n, values] in the least-squares sense, and the relative residual.

    `dtype` is the one in which the rows were stored: as large as its rounding errors the residual may be.
    """
    solution = rows @ torch.linalg.pinv(basis)
    residual = ((solution @ basis - rows).abs().max() / rows.abs().max().clamp_min(1e-30)).item()
    if not residual <= _TOLERANCE + torch.finfo(dtype).eps:
        raise ValueError(
            f"the kernels of {name} lie outside the basis of this model's group (relative residual {residual:.1e}): "
            "the checkpoint belongs to another group"
        )
    return solution, residual
