"""Translator for ConvNeXt checkpoints of flopping-for-flops (https://github.com/georg-bn/flopping-for-flops).

Their layers hold one tensor for each pair of irreps, 'sym' and 'asym', and of a filter the half that a reflection does
not repeat. The files lie in a folder that only a browser opens; `fetch` has none of them.
"""

from typing import Any

import torch

from equivision_timm.models.equivariant_convnext import EquivariantConvNeXt
from equivision_timm.models.variants import create, model_names
from equivision_timm.weights.checkpoint import Entries, Translation

__all__ = ["models", "translate", "translate_to"]

_PATHS = ("sym_to_sym", "asym_to_sym", "sym_to_asym", "asym_to_asym")
KEYWORDS: dict[str, Any] = {"mirror": True, "group_pool": "avg"}


def models() -> list[str]:
    """Models whose checkpoints this format holds."""
    return [name for name in model_names(EquivariantConvNeXt) if name.startswith("d1")]


def translate(state_dict: dict[str, torch.Tensor], model_name: str) -> Translation:
    """State dict of a model of this package, with `mirror=True`, from that of their `d2_convnext_*`.

    Raises:
        WeightsError: the entries do not fit the model or are damaged.
    """
    with torch.device("meta"):
        model = create(model_name, EquivariantConvNeXt, **KEYWORDS)
    return Translation(translate_to(model, state_dict), dict(KEYWORDS))


def translate_to(model: EquivariantConvNeXt, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries of `model`, float32; raises WeightsError as `translate`."""
    source = Entries({name: value for name, value in state_dict.items() if not name.endswith(".zero_center")})
    found: dict[str, torch.Tensor] = {}
    # regular fields (s + a) / sqrt(2) of the patches s, a, which they multiply by 1 / sqrt(2)
    stem = "downsample_layers.0.0.proj_"
    symmetric, antisymmetric = source.take(f"{stem}sym.weight"), source.take(f"{stem}asym.weight")
    found["stem.0.weight"] = (_mirrored(symmetric, 1) + _mirrored(antisymmetric, -1)) / 2
    found["stem.0.bias"] = source.take(f"{stem}sym.bias") / 2
    _norm(source, found, "downsample_layers.0.1", "stem.1.inner")
    for i, stage in enumerate(model.stages):
        if i > 0:
            _norm(source, found, f"downsample_layers.{i}.0", f"stages.{i}.downsample.0.inner")
            _downsample(source, found, f"downsample_layers.{i}.1", f"stages.{i}.downsample.1")
        for j in range(len(list(stage.get_submodule("blocks").children()))):
            _block(source, found, f"stages.{i}.{j}", f"stages.{i}.blocks.{j}.inner")
    for theirs, ours in (("norm", "head.norm"), ("head", "head.fc")):
        for leaf in ("weight", "bias"):
            found[f"{ours}.{leaf}"] = source.take(f"{theirs}.{leaf}")
    return source.finish(found)


def _mirrored(half: torch.Tensor, sign: int) -> torch.Tensor:
    return torch.cat([half, sign * half.flip(-1)], -1)


def _norm(source: Entries, found: dict[str, torch.Tensor], theirs: str, ours: str) -> None:
    found[f"{ours}.weight"] = torch.cat(source.take_all(theirs + ".scaling.alpha_{}", ("sym", "asym")))
    found[f"{ours}.bias"] = source.take(f"{theirs}.scaling.beta")


def _downsample(source: Entries, found: dict[str, torch.Tensor], theirs: str, ours: str) -> None:
    """w_h = (K_ss + x_h K_sa + K_as + x_h K_aa) / 2, K_out,in of the irreps, x_h = 1 or, for the reflection, -1."""
    halves = dict(zip(_PATHS, source.take_all(theirs + ".{}.weight", _PATHS), strict=True))
    symmetric = _mirrored(halves["sym_to_sym"], 1) + _mirrored(halves["sym_to_asym"], -1)
    antisymmetric = _mirrored(halves["asym_to_asym"], 1) + _mirrored(halves["asym_to_sym"], -1)
    weight = torch.stack([symmetric + antisymmetric, symmetric - antisymmetric], 2) / 2  # [out, in, |G|, 2, 2]
    found[f"{ours}.weight"] = weight.flatten(1, 2)
    found[f"{ours}.bias"] = source.take(f"{theirs}.sym_to_sym.bias") / 2**0.5


def _block(source: Entries, found: dict[str, torch.Tensor], theirs: str, ours: str) -> None:
    ss, sa, as_, aa = source.take_all(theirs + ".dwconv.{}.weight", _PATHS)
    sa, as_ = (torch.cat([half, torch.zeros_like(half[..., :1])], -1) for half in (sa, as_))  # the unused centre
    found[f"{ours}.conv_dw.weight"] = torch.cat([ss, sa, as_, aa])
    found[f"{ours}.conv_dw.bias"] = torch.cat(source.take_all(theirs + ".dwconv.{}.bias", _PATHS[:2]))
    _norm(source, found, f"{theirs}.norm", f"{ours}.norm")
    for linear, layer in (("pwconv1", "fc1"), ("pwconv2", "fc2")):
        weights = source.take_all(f"{theirs}.{linear}.linear_{{}}.weight", ("sym", "asym"))
        found[f"{ours}.mlp.{layer}.weight"] = torch.stack([w.flatten(1) for w in weights])  # 1 x 1 convolutions
        found[f"{ours}.mlp.{layer}.bias"] = source.take(f"{theirs}.{linear}.linear_sym.bias")
    found[f"{ours}.ls.gamma"] = torch.cat(source.take_all(theirs + ".gamma.alpha_{}", ("sym", "asym")))
