"""The table of a family becomes models that timm knows: entrypoints, configurations, and a list of names."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.nn as nn
from timm.models import create_model, generate_default_cfgs, register_model

__all__ = ["DIGITS", "Variant", "create", "digits_cfg", "forget", "model_names", "register_family"]

DIGITS = Path(__file__).parents[1] / "digits"  # digits, and weights of tiny networks that read them

Network = TypeVar("Network", bound=nn.Module)
_FAMILIES: dict[str, type[nn.Module]] = {}  # by model name


@dataclass(frozen=True)
class Variant:
    """One row of a family's table."""

    summary: str  # the model in a sentence; its docstring
    arguments: Mapping[str, Any]  # of the network; keywords of `timm.create_model` override them
    cfg: Mapping[str, Any] = field(default_factory=dict)  # timm's pretrained configuration
    tag: str = ""  # of the weights


def register_family(
    module: str,
    network: type[nn.Module],
    create: Callable[..., nn.Module],
    variants: Mapping[str, Variant],
    cfgs: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make every variant a model of timm; its entrypoint becomes an attribute of `module`, the name of a module.

    `create` is called with (name, pretrained, **arguments). `cfgs` are timm's configurations by model name and tag, the
    default first; None for those of the table.
    """
    home = sys.modules[module]
    if cfgs is None:
        cfgs = {f"{name}.{v.tag}" if v.tag else name: v.cfg for name, v in variants.items()}
    default_cfgs = generate_default_cfgs({name: dict(cfg) for name, cfg in cfgs.items()})
    vars(home)["default_cfgs"] = {**getattr(home, "default_cfgs", {}), **default_cfgs}  # where register_model looks
    for name in variants:
        _FAMILIES[name] = network
        setattr(home, name, register_model(_entrypoint(module, name, variants, create)))


def digits_cfg(name: str, size: int) -> dict[str, Any]:
    """timm's configuration of a tiny network for tests and the demo, whose weights lie in the package.

    They were trained on handwritten digits of size x size pixels by scripts/train_digits.py.
    """
    return dict(
        file=str(DIGITS / f"{name}.safetensors"),
        num_classes=10,
        input_size=(3, size, size),
        crop_pct=1.0,
        mean=(0.0, 0.0, 0.0),  # the black ground stays zero, as the padding and the corners of a rotated image are
        std=(1.0, 1.0, 1.0),
        label_names=tuple("0123456789"),
        description="handwritten digits (MNIST), trained upright",
        license="mit",
        origin_url=None,
    )


def forget(names: Iterable[str]) -> None:
    """Take models out of the list of names again; timm cannot unregister models and may still list them."""
    for name in names:
        del _FAMILIES[name]


def _entrypoint(
    module: str, name: str, variants: Mapping[str, Variant], create: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **{**variants[name].arguments, **kwargs})

    entrypoint.__module__, entrypoint.__name__, entrypoint.__qualname__ = module, name, name
    entrypoint.__doc__ = variants[name].summary
    return entrypoint


def model_names(network: type[nn.Module] = nn.Module) -> list[str]:
    """The registered models of this package and of families outside it, sorted; those whose class is a `network`."""
    return sorted(name for name, family in _FAMILIES.items() if issubclass(family, network))


def create(model_name: str, *networks: type[Network], **keywords: Any) -> Network:
    """`timm.create_model(model_name, **keywords)`; ValueError unless it is of one of the classes `networks`."""
    model = create_model(model_name, **keywords)
    if not isinstance(model, networks):
        names = " or ".join(network.__name__ for network in networks)
        raise ValueError(f"{model_name} is a {type(model).__name__}, no {names}: use another model")
    return model
