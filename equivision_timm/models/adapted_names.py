"""`symmetrized`, `canonicalized` and names without keywords such as `d4sym_resnet50`, registered with timm.

`pretrained=True` lets timm load the source into the backbone, as it does for the backbone's own name. Files that hold
the adapted model, with keys `backbone.*`, are loaded into the whole, strictly.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, create_model, get_pretrained_cfg, is_model, load_state_dict
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs

from equivision_timm.models.adapted import Canonicalized, Symmetrized
from equivision_timm.models.variants import Variant, register_family

__all__: list[str] = []  # register_model adds every entrypoint

BACKBONES = (
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "convnextv2_nano",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "regnety_032",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_clip_224",
    "eva02_small_patch14_336",
)
_FEATURES = ("features_only", "out_indices", "feature_cls")
_PARAMETERS = ("first_conv", "classifier")  # fields of a configuration that name them
_IDENTITY = ("architecture", "tag")  # fields that differ between the adapted model and its backbone
_PREFIXED = "backbone.{}".format


def _create(
    variant: str,
    pretrained: bool,
    network: type[Symmetrized],
    pretrained_cfg: Any = None,  # a tag, a dict or a PretrainedCfg
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model called `variant`: a `network` of a backbone that timm makes and loads."""
    backbone = kwargs.pop("backbone", "resnet18")
    if not isinstance(backbone, str):
        raise TypeError(f"backbone is a {type(backbone).__name__}, not a name: use the class {network.__name__}")
    features = {name: kwargs.pop(name) for name in _FEATURES if name in kwargs}
    own = {name: kwargs.pop(name) for name in inspect.signature(network).parameters if name in kwargs}
    resolved = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    registered = _registered(variant, resolved.tag)
    if variant in _NAMES:
        trained = kwargs.get("num_classes", registered.num_classes) == registered.num_classes > 1
        averages = network is Symmetrized or own.get("choice") == "soft"
        own.setdefault("group_pool", "prob" if averages and trained else "avg")
        backbone = f"{backbone}.{_registered(backbone, resolved.tag).tag}"
    if features.get("features_only"):
        features = _getter(backbone, features, kwargs)

    whole = pretrained and (resolved.source in ("hf-hub", "local-dir") or _holds_whole(resolved))
    changed = {field: value for field, value in vars(resolved).items() if value != getattr(registered, field)}
    overlay = _renamed(changed, lambda name: name.removeprefix("backbone."))
    loaded: dict[str, Any] = {"pretrained": pretrained and not whole, "pretrained_cfg_overlay": overlay}
    model = network(backbone, **loaded, cache_dir=cache_dir, **own, **kwargs)
    cfg = _renamed(model.backbone.pretrained_cfg, _PREFIXED)
    return build_model_with_cfg(
        lambda **_: model,  # the keywords are applied already; timm notes them
        variant,
        whole,
        pretrained_cfg={**cfg, "architecture": variant, "tag": resolved.tag},
        pretrained_model_args=pretrained_model_args,
        cache_dir=cache_dir,
        **features,
        **kwargs,
    )


def _registered(name: str, tag: str | None) -> PretrainedCfg:
    """timm's configuration of a model; the default one if it has no such tag."""
    return get_arch_pretrained_cfgs(name).get(f"{name}.{tag}") or cast(PretrainedCfg, get_pretrained_cfg(name))


def _holds_whole(cfg: PretrainedCfg) -> bool:
    """Whether the file or state dict of a configuration holds an adapted model, not a backbone."""
    state = cfg.state_dict or (load_state_dict(cfg.file) if cfg.file else {})
    return any(name.startswith("backbone.") for name in state)


def _renamed(cfg: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """A configuration for another architecture, with new names of parameters: none, one or several in a field."""

    def new(names: Any) -> Any:
        return rename(names) if isinstance(names, str) else names and tuple(map(rename, names))

    shared = {field: value for field, value in cfg.items() if field not in _IDENTITY}
    return shared | {field: new(shared[field]) for field in _PARAMETERS if field in shared}


def _getter(backbone: str, features: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """timm's options for maps of `forward_intermediates`; by default the backbone's own levels."""
    if features.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
        raise ValueError(f"feature_cls={features['feature_cls']!r} would return maps of the views: use 'getter'")
    if "out_indices" not in features:
        with torch.device("meta"):
            plain = cast(Any, create_model(backbone, **{**options, "features_only": True, "device": None}))
        features = {**features, "out_indices": tuple(plain.feature_info.out_indices)}
    return {**features, "feature_cls": "getter"}


_GENERIC = {
    "symmetrized": Variant("A model of timm averaged over a group; see Symmetrized", {"network": Symmetrized}),
    "canonicalized": Variant("A model of timm on images put upright; see Canonicalized", {"network": Canonicalized}),
}
_NAMES = {
    f"{kind}_{backbone}": Variant(f"timm's {backbone} {how}", dict(network=network, backbone=backbone, group=group))
    for kind, network, group, how in (
        ("c4sym", Symmetrized, "c4", "averaged over rotations by 90 degrees"),
        ("d4sym", Symmetrized, "d4", "averaged over rotations by 90 degrees and reflections"),
        ("c4can", Canonicalized, "c4", "on images rotated upright by c4orient_lite0"),
    )
    for backbone in BACKBONES
    if is_model(backbone)
}
for _name, _variant in (_GENERIC | _NAMES).items():
    _cfgs = {_name: dict(first_conv="backbone.conv1", classifier="backbone.fc")}
    if _name in _NAMES:
        _tags = get_arch_pretrained_cfgs(_variant.arguments["backbone"]).values()
        _cfgs = {f"{_name}.{cfg.tag}": _renamed(vars(cfg), _PREFIXED) for cfg in _tags}
    register_family(__name__, _variant.arguments["network"], _create, {_name: _variant}, _cfgs)
