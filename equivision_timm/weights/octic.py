"""Translator for checkpoints of octic-vits (https://github.com/davnords/octic-vits).

Their layers hold one tensor for each irrep, those of this package one for all one-dimensional irreps and one for E. In
attention, their heads divide the channels of both copies of E together, here those of each copy. Their position tiles
have the channels last. DINOv2 files also hold the heads of the self-supervised training, which are dropped.
"""

import re

import torch

from equivision_timm.models.equivariant_vit import VARIANTS, EquivariantViT
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.models.variants import create
from equivision_timm.weights.checkpoint import Entries, Translation
from equivision_timm.weights.released import released

__all__ = ["invariants_of", "models", "translate", "translate_to"]

_ONES = ("A1", "A2", "B1", "B2")
_HEADS = ("dino_head.", "ibot_head.")


def models() -> list[str]:
    """Models whose checkpoints this format holds."""
    return [name for name, entry in released().items() if entry.format == "octic"]


def translate(state_dict: dict[str, torch.Tensor], model_name: str) -> Translation:
    """State dict of a model of this package from that of octic-vits, with or without the prefix `backbone.`.

    Raises WeightsError if entries do not fit the model or are damaged, or if the class token is not invariant.
    """
    network = {name.removeprefix("backbone."): v for name, v in state_dict.items() if not name.startswith(_HEADS)}
    invariants, own = invariants_of(network), VARIANTS[model_name].arguments.get("invariants", "power")
    keywords = {"invariants": invariants} if invariants and own and invariants != own else {}
    with torch.device("meta"):
        model = create(model_name, EquivariantViT, **keywords)
    notes = {"invariants": invariants or "none: a hybrid, NOT invariant"}
    if dropped := len(state_dict) - len(network):
        notes["dropped"] = f"{dropped} entries of heads of the training"
    return Translation(translate_to(model, network), keywords, notes)


def invariants_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Kind of the invariants, 'power' or 'polynomial', by the shape of the layer that reads them; '' for a hybrid."""
    if "invariant_proj.weight" not in state_dict:
        return ""
    width, count = state_dict["invariant_proj.weight"].shape
    return "polynomial" if 8 * count == 32 * width else "power"  # width = 8 fields; 32 or 6 invariants of each field


def translate_to(model: EquivariantViT, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries of `model`, float32; raises WeightsError as `translate`. Mask tokens of DINOv2 are dropped."""
    source = Entries({_dinov2_name(name): value for name, value in state_dict.items()})
    found: dict[str, torch.Tensor] = {}
    names = (*_ONES, "E_left", "E_right")
    found["patch_embed.proj.weight"] = torch.cat(source.take_all("patch_embed.lift8.conv_{}.weight", names))
    found["patch_embed.proj.bias"] = source.take("patch_embed.lift8.conv_A1.bias")
    positions = torch.stack(source.take_all("pos_embed.{}", tuple("012345")))  # [6, h, w, fields]
    found["pos_embed"] = positions.permute(0, 3, 1, 2)
    found["cls_token"] = source.take("cls_token.0")
    for name in [name for name in source.left if name.startswith("cls_token.")]:  # 4 (DeiT III) or 7 (DINOv2)
        if source.take(name).any():
            raise WeightsError(f"{name} is not zero: this class token is not invariant")
    source.left = {name: value for name, value in source.left.items() if not name.startswith("mask_token.")}
    heads: int = model.blocks[0].get_submodule("attn").num_heads  # type: ignore[assignment]
    for index in range(model.equivariant_depth):
        _equivariant_block(source, found, f"blocks.{index}", heads)
    transition = f"blocks.{model.equivariant_depth}.transition.proj"
    for name in model.state_dict():
        if name not in found:
            found[name] = source.take(name.replace(transition, "invariant_proj"))
    return source.finish(found)


def _dinov2_name(name: str) -> str:
    """'blocks.0.ls1.alpha_A1' for 'blocks.0.gamma_1.alpha_A1' of DeiT III, and '....ls1.gamma' for '....gamma_1'."""
    name = re.sub(r"\.gamma_(\d)\b", r".ls\1", name)
    return f"{name}.gamma" if name.endswith((".ls1", ".ls2")) else name


def _equivariant_block(source: Entries, found: dict[str, torch.Tensor], block: str, heads: int) -> None:
    for i in (1, 2):
        scaling = f"{block}.norm{i}.scaling"
        found[f"{block}.norm{i}.weight"] = torch.cat(source.take_all(scaling + ".alpha_{}", (*_ONES, "E")))
        found[f"{block}.norm{i}.bias"] = source.take(f"{scaling}.beta")
        found[f"{block}.ls{i}.gamma"] = torch.cat(source.take_all(f"{block}.ls{i}.alpha_{{}}", (*_ONES, "E")))
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        name = f"{block}.{layer}"
        found[f"{name}.weight"] = torch.stack(source.take_all(name + ".lin_{}.weight", _ONES))
        found[f"{name}.bias"] = source.take(f"{name}.lin_A1.bias")
        plane = source.take(f"{name}.lin_E.weight")
        if layer == "attn.qkv":  # rows: (q k v, head, copy, channel) -> (copy, q k v, head, channel)
            plane = plane.unflatten(0, (3, heads, 2, -1)).permute(2, 0, 1, 3, 4).flatten(0, 3)
        elif layer == "attn.proj":  # columns: (head, copy, channel) -> (copy, head, channel)
            plane = plane.unflatten(1, (heads, 2, -1)).transpose(1, 2).flatten(1)
        found[f"{name}.weight_plane"] = plane
