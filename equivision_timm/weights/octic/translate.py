"""A state dict of octic-vits -> ours: {their name: tensor} -> {our name: tensor}, value by value the same network.

Their layers hold one tensor for each irrep, ours one for all one-dimensional irreps and one for E. Two things are
ordered otherwise: in attention their heads divide the channels of both copies of E together, ours those of each copy;
and their position tiles have the channels last.
"""

from typing import Any

import torch

from equivision_timm.models.attributes import attribute
from equivision_timm.models.equivariant_vit import VARIANTS, EquivariantViT
from equivision_timm.models.variants import create

__all__ = ["fitting_models", "invariants_of", "translate", "translate_to"]

TAGS = ("deit3_in1k", "dinov2_in1k")  # of the weights that octic-vits published
_ONES = ("A1", "A2", "B1", "B2")


class _Source:
    """Their entries, each to be taken once."""

    def __init__(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.left = dict(state_dict)

    def take(self, name: str) -> torch.Tensor:
        if name not in self.left:
            raise ValueError(f"there is no entry {name}")
        return self.left.pop(name)

    def take_all(self, pattern: str, names: tuple[str, ...]) -> list[torch.Tensor]:
        return [self.take(pattern.format(name)) for name in names]


def translate(state_dict: dict[str, torch.Tensor], model_name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The entries of `model_name`, float32, and the keywords that it must be built with, from those of octic-vits.

    Args:
        state_dict: their names, without wrappers, see `read_octic`.
        model_name: e.g. 'd4vit_large_patch16_224'.

    Raises:
        ValueError: the checkpoint is one of another model; an entry is missing, of another shape, or left over; a class
            token that is not invariant.
    """
    keywords = _keywords(state_dict, model_name)
    with torch.device("meta"):
        model = create(model_name, EquivariantViT, **keywords)
    try:
        return translate_to(model, state_dict), keywords
    except ValueError as error:
        others = [name for name in fitting_models(state_dict) if name != model_name]
        hint = f", but of {' or '.join(others)}" if others else ""
        raise ValueError(f"this is no checkpoint of {model_name}{hint}: {error}") from error


def invariants_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Which invariants the ordinary half reads, from the shape of what reads them: of fields, 6 or 32; '' for a hybrid.

    Raises:
        ValueError: any other shape.
    """
    weight = state_dict.get("invariant_proj.weight")
    if weight is None:
        return ""
    kinds = {(8, 6): "power", (8, 32): "polynomial"}  # of the width d = 8 * fields
    fields = weight.shape[0] // 8 if weight.ndim == 2 else 0
    for (width, count), kind in kinds.items():
        if fields and tuple(weight.shape) == (width * fields, count * fields):
            return kind
    raise ValueError(
        f"invariant_proj.weight of shape {tuple(weight.shape)} reads invariants that we do not know: power invariants "
        "are 3/4 of the width, polynomial ones 4 times"
    )


def fitting_models(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The models that `state_dict` fits by names and shapes, of those with weights of octic-vits."""
    meta = {name: value.detach().to("meta") for name, value in state_dict.items()}
    return [name for name, variant in VARIANTS.items() if variant.tag in TAGS and _fits(meta, name)]


def _fits(meta: dict[str, torch.Tensor], model_name: str) -> bool:
    try:
        with torch.device("meta"):
            model = create(model_name, EquivariantViT, **_keywords(meta, model_name))
        translate_to(model, meta)
    except (ValueError, RuntimeError):  # RuntimeError: shapes that do not even divide
        return False
    return True


def translate_to(model: EquivariantViT, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of `model`; raises ValueError as `translate`. Mask tokens of DINOv2's training are left out."""
    source = _Source(state_dict)
    ours: dict[str, torch.Tensor] = {}
    names = (*_ONES, "E_left", "E_right")
    ours["patch_embed.proj.weight"] = torch.cat(source.take_all("patch_embed.lift8.conv_{}.weight", names))
    ours["patch_embed.proj.bias"] = source.take("patch_embed.lift8.conv_A1.bias")
    positions = torch.stack(source.take_all("pos_embed.{}", tuple("012345")))  # [6, h, w, fields]
    ours["pos_embed"] = positions.permute(0, 3, 1, 2)
    ours["cls_token"] = source.take("cls_token.0")
    for name in [name for name in source.left if name.startswith("cls_token.")]:  # 4 (DeiT III) or 7 (DINOv2)
        value = source.take(name)
        if not value.is_meta and value.any():
            raise ValueError(f"{name} is not zero: this class token is not invariant")
    for name in [name for name in source.left if name.startswith("mask_token.")]:
        source.take(name)
    heads = attribute(model.blocks[0].get_submodule("attn"), "num_heads", int)
    for index in range(len(model.blocks)):
        if index < model.equivariant_depth:
            _equivariant_block(source, ours, f"blocks.{index}", heads)
        else:
            _ordinary_block(source, ours, f"blocks.{index}")
    transition = f"blocks.{model.equivariant_depth}.transition.proj"
    theirs = {transition: "invariant_proj", "norm": "norm", "head": "head"}
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        if module in theirs:
            ours[name] = source.take(f"{theirs[module]}.{leaf}")
    if source.left:
        raise ValueError(f"{len(source.left)} entries are left over, such as {next(iter(source.left))}")
    _check_shapes(model, ours)
    return {name: value.float().contiguous() for name, value in ours.items()}


def _keywords(state_dict: dict[str, torch.Tensor], model_name: str) -> dict[str, Any]:
    """The keyword for other invariants than the model's own; a hybrid and an invariant network are no such pair."""
    found, own = invariants_of(state_dict), VARIANTS[model_name].arguments.get("invariants", "power")
    return {"invariants": found} if found and own and found != own else {}


def _check_shapes(model: EquivariantViT, ours: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in {**expected, **ours}:
        found = tuple(ours[name].shape) if name in ours else None
        if found != expected.get(name):
            raise ValueError(f"{name} would have shape {found}, but must have {expected.get(name)} (None: no entry)")


def _equivariant_block(source: _Source, ours: dict[str, torch.Tensor], block: str, heads: int) -> None:
    scale = "gamma_{}" if f"{block}.gamma_1.alpha_A1" in source.left else "ls{}"
    for i in (1, 2):
        scaling = f"{block}.norm{i}.scaling"
        ours[f"{block}.norm{i}.weight"] = torch.cat(source.take_all(scaling + ".alpha_{}", (*_ONES, "E")))
        ours[f"{block}.norm{i}.bias"] = source.take(f"{scaling}.beta")
        alpha = f"{block}.{scale.format(i)}.alpha_"
        ours[f"{block}.ls{i}.gamma"] = torch.cat(source.take_all(alpha + "{}", (*_ONES, "E")))
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        name = f"{block}.{layer}"
        ours[f"{name}.weight"] = torch.stack(source.take_all(name + ".lin_{}.weight", _ONES))
        ours[f"{name}.bias"] = source.take(f"{name}.lin_A1.bias")
        plane = source.take(f"{name}.lin_E.weight")
        if layer == "attn.qkv":  # rows: (q k v, head, copy, channel) -> (copy, q k v, head, channel)
            plane = plane.unflatten(0, (3, heads, 2, -1)).permute(2, 0, 1, 3, 4).flatten(0, 3)
        elif layer == "attn.proj":  # columns: (head, copy, channel) -> (copy, head, channel)
            plane = plane.unflatten(1, (heads, 2, -1)).transpose(1, 2).flatten(1)
        ours[f"{name}.weight_plane"] = plane


def _ordinary_block(source: _Source, ours: dict[str, torch.Tensor], block: str) -> None:
    deit = f"{block}.gamma_1" in source.left
    for i in (1, 2):
        ours[f"{block}.ls{i}.gamma"] = source.take(f"{block}.gamma_{i}" if deit else f"{block}.ls{i}.gamma")
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        for name in (f"{block}.{layer}.weight", f"{block}.{layer}.bias"):
            ours[name] = source.take(name)
