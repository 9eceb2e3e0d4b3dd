"""`symmetrized`, `canonicalized` and names without keywords such as `d4sym_resnet50`, registered with timm.

`pretrained=True` lets timm load the source into the backbone, as it does for the backbone's own name. Files that hold
the adapted model, with keys `backbone.*`, are loaded into the whole, strictly.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn as nn
from timm.models import (
    build_model_with_cfg,
    create_model,
    get_pretrained_cfg,
    is_model,
    list_pretrained,
    load_state_dict,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import PretrainedCfg

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
_PREFIXED = ("first_conv", "classifier")  # fields of a configuration that name parameters
_IDENTITY = ("architecture", "tag", "source")  # fields that differ between the adapted model and its backbone


def _create(
    variant: str,
    pretrained: bool,
    network: type[Symmetrized] | type[Canonicalized],
    pretrained_cfg: Any = None,  # a tag, a dict or a PretrainedCfg
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model called `variant`: a `network` of a backbone that timm makes and loads."""
    features = {name: kwargs.pop(name) for name in _FEATURES if name in kwargs}
    resolved = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    from_folder = resolved.source in ("hf-hub", "local-dir")
    whole = pretrained and (from_folder or _holds_whole(resolved))
    backbone = kwargs.pop("backbone", "resnet18")
    if not isinstance(backbone, str):
        raise TypeError(f"backbone is a {type(backbone).__name__}, not a name: use the class {network.__name__}")
    own = {name: kwargs.pop(name) for name in inspect.signature(network).parameters if name in kwargs}
    overlay: dict[str, Any] = {}
    if variant in _NAMES:
        classes = _registered(variant, resolved.tag).num_classes  # of the weights
        trained = kwargs.get("num_classes", classes) == classes and classes > 1
        averages = network is Symmetrized or own.get("choice") == "soft"
        own.setdefault("group_pool", "prob" if averages and trained else "avg")
        backbone = f"{backbone}.{_registered(backbone, resolved.tag).tag}"
    if not from_folder:
        if isinstance(pretrained_cfg, (dict, PretrainedCfg)):  # of `variant`, complete for a name
            overlay = _differences(resolved, _registered(variant, resolved.tag))
        overlay = _renamed({**overlay, **(pretrained_cfg_overlay or {})}, lambda name: name.removeprefix("backbone."))
    if features.get("features_only"):
        features = _getter(backbone, features, kwargs)

    loaded: dict[str, Any] = {"pretrained": pretrained and not whole, "pretrained_cfg_overlay": overlay}
    model = network(backbone, **loaded, cache_dir=cache_dir, **own, **kwargs)
    cfg = resolved
    if not from_folder:
        cfg = {**model.backbone.pretrained_cfg, "architecture": variant, "tag": resolved.tag}
        cfg = _renamed(cfg, lambda name: f"backbone.{name}")
    return build_model_with_cfg(
        lambda **_: model,  # the keywords are applied already; timm notes them
        variant,
        whole,
        pretrained_cfg=cast(Any, cfg),  # timm takes a PretrainedCfg, too
        pretrained_model_args=pretrained_model_args,
        cache_dir=cache_dir,
        **features,
        **kwargs,
    )


def _holds_whole(cfg: PretrainedCfg) -> bool:
    """Whether the file or state dict of a configuration holds an adapted model, not a backbone."""
    state = cfg.state_dict or (load_state_dict(cfg.file) if cfg.file else {})
    return any(name.startswith("backbone.") for name in state)


def _registered(name: str, tag: str | None) -> PretrainedCfg:
    """timm's configuration of a model; the default one if it has no such tag."""
    tagged = f"{name}.{tag}"
    return cast(Any, get_pretrained_cfg(tagged if tagged in list_pretrained(f"{name}.*") else name))


def _differences(cfg: PretrainedCfg, registered: PretrainedCfg) -> dict[str, Any]:
    """The fields of a configuration that differ from the registered one: what a script or user changed."""
    before = asdict(registered)
    return {k: v for k, v in asdict(cfg).items() if k not in _IDENTITY and v is not None and v != before[k]}


def _renamed(cfg: Mapping[str, Any], rename: Any) -> dict[str, Any]:
    """The configuration, with other names of parameters."""
    renamed = dict(cfg)
    for field in _PREFIXED:
        value = renamed.get(field)
        if isinstance(value, str):
            renamed[field] = rename(value)
        elif value:
            renamed[field] = tuple(map(rename, value))
    return renamed


def _getter(backbone: str, features: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """timm's options for maps of `forward_intermediates`; by default the backbone's own levels."""
    if features.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
        raise ValueError(f"feature_cls={features['feature_cls']!r} would return maps of the views: use 'getter'")
    if "out_indices" not in features:
        with torch.device("meta"):
            others = {k: v for k, v in options.items() if k != "device"}
            plain = cast(Any, create_model(backbone, features_only=True, **others))
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
        ("c4can", Canonicalized, "c4", "on images rotated upright by c4orient_tiny"),
    )
    for backbone in BACKBONES
    if is_model(backbone)
}


def _cfgs() -> dict[str, Any]:
    """timm's configurations by name and tag, the default one first."""
    cfgs: dict[str, Any] = {name: dict(first_conv="backbone.conv1", classifier="backbone.fc") for name in _GENERIC}
    pretrained = list_pretrained()
    for name, variant in _NAMES.items():
        backbone = variant.arguments["backbone"]
        tags = [tagged.partition(".")[2] for tagged in pretrained if tagged.startswith(f"{backbone}.")]
        default = cast(Any, get_pretrained_cfg(backbone)).tag
        for tag in sorted(tags, key=lambda tag: tag != default):
            cfg = vars(get_pretrained_cfg(f"{backbone}.{tag}"))
            own = {key: value for key, value in cfg.items() if key not in _IDENTITY}
            cfgs[f"{name}.{tag}"] = _renamed(own, lambda name: f"backbone.{name}")
    return cfgs


_CFGS = _cfgs()
for _network in (Symmetrized, Canonicalized):
    register_family(
        __name__,
        _network,
        _create,
        {name: v for name, v in (_GENERIC | _NAMES).items() if v.arguments["network"] is _network},
        cfgs=_CFGS,
    )
