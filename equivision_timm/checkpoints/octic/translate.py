"""A state dict of octic-vits -> ours: {their name: tensor} -> {our name: tensor}, value by value the same network.

Their layers hold one tensor for each irrep, ours one for all one-dimensional irreps and one for E. Two things are
ordered otherwise: in attention their heads divide the channels of both copies of E together, ours those of each copy;
and their position tiles have the channels last.
"""

import timm
import torch

from equivision_timm.models import EquivariantViT

__all__ = ["fitting_models", "translate"]

_ONES = ("A1", "A2", "B1", "B2")


class _Source:
    """Their entries, each to be taken once."""

    def __init__(self, state_dict: dict[str, torch.Tensor], model_name: str) -> None:
        self.left = dict(state_dict)
        self.model_name = model_name

    def take(self, name: str) -> torch.Tensor:
        try:
            return self.left.pop(name)
        except KeyError:
            raise ValueError(f"the checkpoint has no entry {name}, which {self.model_name} needs") from None

    def take_all(self, pattern: str, names: tuple[str, ...]) -> list[torch.Tensor]:
        return [self.take(pattern.format(name)) for name in names]


def translate(state_dict: dict[str, torch.Tensor], model_name: str) -> dict[str, torch.Tensor]:
    """The entries of `model_name` from those of octic-vits, float32.

    Args:
        state_dict: their names, without wrappers, see `read_octic`.
        model_name: e.g. 'd4vit_large_patch16_224'.

    Raises:
        ValueError: the checkpoint is one of another model; an entry is missing, of another shape, or left over; a class
            token that is not invariant.
    """
    with torch.device("meta"):
        model = timm.create_model(model_name)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    try:
        ours = _translate(state_dict, model, model_name)
        _check(expected, {name: tuple(value.shape) for name, value in ours.items()}, model_name)
    except ValueError as error:
        others = [name for name in fitting_models(state_dict) if name != model_name]
        hint = f": it is one of {' or '.join(others)}" if others else ""
        raise ValueError(f"this is no checkpoint of {model_name}{hint} ({error})") from error
    return ours


def fitting_models(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The models that `state_dict` fits by names and shapes, of those with weights of octic-vits."""
    fitting = []
    for tagged in timm.list_models("d4*", module="equivariant_vit"):
        with torch.device("meta"):
            model = timm.create_model(tagged)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        meta = {name: value.detach().to("meta") for name, value in state_dict.items()}
        try:
            _check(shapes, {k: tuple(v.shape) for k, v in _translate(meta, model, tagged).items()}, tagged)
        except (ValueError, RuntimeError):
            continue
        fitting.append(tagged)
    return fitting


def _check(expected: dict[str, tuple], found: dict[str, tuple], model_name: str) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{name} would have shape {found.get(name)}, in {model_name} it has {expected.get(name)} (None: no entry)"
            )


def _translate(state_dict: dict[str, torch.Tensor], model: EquivariantViT, model_name: str) -> dict[str, torch.Tensor]:
    source = _Source(state_dict, model_name)
    ours: dict[str, torch.Tensor] = {}
    names = (*_ONES, "E_left", "E_right")
    ours["patch_embed.proj.weight"] = torch.cat(source.take_all("patch_embed.lift8.conv_{}.weight", names))
    ours["patch_embed.proj.bias"] = source.take("patch_embed.lift8.conv_A1.bias")
    positions = torch.stack(source.take_all("pos_embed.{}", tuple("012345")))  # [6, h, w, fields]
    ours["pos_embed"] = positions.permute(0, 3, 1, 2)
    ours["cls_token"] = source.take("cls_token.0")
    for name in [name for name in source.left if name.startswith("cls_token.")]:  # 4 (DeiT III) or 7 (DINOv2)
        value = source.take(name)
        if value.device.type != "meta" and value.any():
            raise ValueError(f"{name} is not zero: this class token is not invariant")
    heads = model.blocks[0].attn.num_heads
    for index in range(len(model.blocks)):
        block = f"blocks.{index}"
        if index < model.equivariant_depth:
            _equivariant_block(source, ours, block, heads)
        else:
            _ordinary_block(source, ours, block)
    for name in ("weight", "bias"):
        if any(key.startswith("hand_over.proj") for key, _ in model.named_parameters()):
            ours[f"hand_over.proj.{name}"] = source.take(f"invariant_proj.{name}")
        ours[f"norm.{name}"] = source.take(f"norm.{name}")
        if model.num_classes:
            ours[f"head.{name}"] = source.take(f"head.{name}")
    for name in [name for name in source.left if name.startswith("mask_token.")]:
        source.take(name)  # of DINOv2's training: stands for hidden patches
    if source.left:
        raise ValueError(
            f"{len(source.left)} entries of the checkpoint are left over, such as {next(iter(source.left))}"
        )
    return {name: value.float().contiguous() for name, value in ours.items()}


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
