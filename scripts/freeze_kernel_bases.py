"""Sample the kernel bases from escnn, factor them, and write `tables.safetensors` and `manifest.json`.

    OPENBLAS_CORETYPE=Haswell python scripts/freeze_kernel_bases.py --out DIR

escnn finds the Clebsch-Gordan coefficients of D_4 and D_8 numerically, and their signs depend on the machine, so the
script keeps to the signs of the tables already in the package: it refuses to run where scikit-learn is importable
(escnn then draws a random pattern), refuses a basis that differs by more than signs, and says which signs differ.
Needs the extra `escnn`.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from equivision_timm.groups import Group
from equivision_timm.kernel_bases.basis import Ring, sample_functions
from equivision_timm.kernel_bases.from_escnn import sample_kernels

GROUPS = ("c1", "d1", "c4", "d4", "c8", "d8")
KERNELS = ((1, "regular"), (3, "regular"), (1, "trivial"), (3, "trivial"), (7, "trivial"))
PACKAGE = Path(__file__).parents[1] / "equivision_timm" / "kernel_bases"


def factor(kernels: torch.Tensor, group: Group, rings: tuple[Ring, ...]) -> tuple[torch.Tensor, float]:
    """C [n_basis, J, H] with K_b(x)[g, h] = sum_j C[b, j, g^-1 h] psi_j(g^-1 x), and the largest residual.

    The row g = e is the base kernel: least squares against psi_j gives C; all other rows must then follow.
    """
    functions = sample_functions(group, kernels.shape[-1], rings).flatten(2)  # [|G|, J, k * k]
    base = kernels[:, 0].flatten(2)  # [n_basis, H, k * k]
    solution = torch.linalg.lstsq(functions[0].T, base.flatten(0, 1).T).solution  # [J, n_basis * H]
    coefficients = solution.unflatten(1, base.shape[:2]).transpose(0, 1).contiguous()  # [n_basis, J, H]
    coefficients[coefficients.abs() < 1e-9] = 0
    quotients = group.left_quotients() if base.shape[1] > 1 else torch.zeros(group.order, 1, dtype=torch.int64)
    rebuilt = torch.einsum("bjgh,gjx->bghx", coefficients[:, :, quotients], functions)
    return coefficients, (rebuilt - kernels.flatten(3)).abs().max().item()


def match_signs(found: torch.Tensor, canonical: torch.Tensor, key: str) -> tuple[torch.Tensor, list[int]]:
    """`found` with each element's sign turned to the canonical one, and the elements that were turned."""
    signs = torch.sign((found * canonical).flatten(1).sum(1))
    turned = found * signs[:, None, None]
    error = (turned - canonical).abs().max().item()
    if error > 1e-6:
        raise SystemExit(
            f"{key}: differs from the frozen basis by {error:.1e} beyond signs; escnn 1.0.11 is the origin"
        )
    return turned, torch.nonzero(signs < 0).flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables.safetensors and manifest.json")
    parser.add_argument(
        "--canonical", type=Path, default=PACKAGE / "tables.safetensors", help="tables that set the signs"
    )
    args = parser.parse_args()
    if importlib.util.find_spec("sklearn"):
        sys.exit("scikit-learn is importable, with which escnn's signs are random: use an environment without it")

    canonical = load(args.canonical.read_bytes())
    tables, elements, rings, negated = {}, {}, {}, {}
    for name, (size, input_type) in tqdm([(g, k) for g in GROUPS for k in KERNELS], desc="bases"):
        key, group = f"{name}/{size}x{size}/{input_type}", Group.from_name(name)
        sampled = sample_kernels(name, size, input_type)
        if rings.setdefault(str(size), sampled["rings"]) != sampled["rings"]:
            sys.exit(f"{key}: its rings {sampled['rings']} differ from {rings[str(size)]} of the other groups")
        coefficients, residual = factor(
            sampled["kernels"].double(), group, tuple(Ring(**ring) for ring in sampled["rings"])
        )
        if residual > 1e-6:
            sys.exit(f"{key}: the factored form misses escnn's kernels by {residual:.1e}")
        coefficients, turned = match_signs(coefficients, canonical[f"{key}/coefficients"], key)
        if turned:
            negated[key] = turned
        tables[f"{key}/coefficients"], tables[f"{key}/he_std"] = coefficients.contiguous(), sampled["he_std"].double()
        elements[key] = sampled["elements"]

    content = save(tables)
    manifest = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "origin": {"escnn": version("escnn"), "numpy": version("numpy"), "scipy": version("scipy")},
        "made_by": "scripts/freeze_kernel_bases.py",
        "source": "escnn (https://github.com/QUVA-Lab/escnn, BSD-3-Clause-Clear)",
        "rings": rings,
        "elements": elements,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.safetensors").write_bytes(content)
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"wrote {len(content)} bytes, sha256 {manifest['sha256']}, to {args.out}")
    for key, turned in negated.items():
        print(f"{key}: this machine's escnn has the opposite sign at elements {turned}; canonical signs were written")


if __name__ == "__main__":
    main()
