"""Model card of a publication, by timm's own writer of cards, from a model on the meta device; the cost of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import model_entrypoint
from timm.models._hub import generate_readme
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.errors import one_line
from equivision_timm.groups import Group
from equivision_timm.models import EquivariantConvNeXt, EquivariantViT, fuse
from equivision_timm.weights.released import released

__all__ = ["complexity", "gmacs", "model_card"]

_KINDS = {
    "top1": "Reported top-1 accuracy",
    "top5": "Reported top-5 accuracy",
    "linear": "Reported top-1 accuracy of a linear classifier on frozen features",
    "knn": "Reported top-1 accuracy of nearest neighbours of frozen features",
}
_USAGE = """```python
import equivision_timm  # registers the models
import timm
import torch

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{output} = model(transform(image).unsqueeze(0))  # image: an RGB picture opened with PIL
features = model.forward_features(torch.randn(1, 3, {size}, {size}))  # {shape}
```
The features are {features}.
Keywords such as `num_classes`, `in_chans`, `global_pool` and `features_only` work as for any timm model."""


def model_card(model_name: str, repository: str, provenance: dict[str, str], has_classifier: bool = True) -> str:
    """The model card of a model with released weights in the `repository` 'organisation/name', in Markdown."""
    arguments: dict[str, Any] = {} if has_classifier else {"num_classes": 0}
    entry = released()[model_name]
    with torch.device("meta"):
        model: Any = timm.create_model(model_name, **arguments).eval()
        cost_size = model.pretrained_cfg["input_size"][-1]
        size = model.exact_sizes(cost_size)[1]
        with torch.no_grad():
            features = model.forward_features(torch.empty(1, model.in_chans, size, size))
    parameters, dense = complexity(model_name, cost_size, **arguments)
    classifies, licence = model.num_classes > 0, model.pretrained_cfg["license"]
    output = "logits" if classifies else "vector"
    kept = "tokens: the class token first, then one for each patch, row by row"
    if features.ndim == 4:
        kept = f"{model.feature_info[-1]['num_fields']} regular fields, with one channel for each element of the group"
    details = {
        "Model Type": f"Equivariant image {'classifier' if classifies else 'encoder'}, group {model.group.upper()}",
        "Exact sizes": _exact_sizes(model, size),
        "Params (M)": f"{parameters / 1e6:.4g}",
        f"GMACs at {cost_size} x {cost_size} (of ResNets with dense filters)": f"{dense:.4g}",
        "Dataset": "ImageNet-1k",
        **{_KINDS[key]: f"{100 * value:.1f} %" for key, value in entry.reported.items() if has_classifier},
        "Original": f"{entry.project}, {entry.source}, which reports the accuracies; licence: {licence}",
        "Origin of the file": {key: f"`{one_line(value)}`" for key, value in provenance.items()},
    }
    card = {
        "tags": [f"image-{'classification' if classifies else 'feature-extraction'}", "timm", "equivariance"],
        "license": licence,
        "description": f"{model_entrypoint(model_name).__doc__}\n\n{_symmetry(model)}",
        "details": details,
        "usage": _USAGE.format(
            repository=repository, output=output, size=size, shape=list(features.shape), features=kept
        ),
        "citation": [entry.citation, Path(__file__).with_name("timm.bib").read_text(encoding="utf-8")],
    }
    return generate_readme(card, repository.split("/")[1], card["tags"][0])


def complexity(model_name: str, size: int = 224, **arguments: Any) -> tuple[int, float]:
    """Number of parameters, and `gmacs` of the dense form, of ConvNeXts as they are; `arguments` of the model."""
    with torch.device("meta"):
        model = timm.create_model(model_name, **arguments).eval()
    form = None if isinstance(model, EquivariantConvNeXt) else "dense"
    return sum(p.numel() for p in model.parameters()), gmacs(model, (3, size, size), form)


def gmacs(model: nn.Module, input_size: Sequence[int], form: str | None) -> float:
    """10^9 multiply-accumulates of an image [C, H, W] by PyTorch's flop counter, of a `form` of `fuse`; None: as it is.

    Convolutions and matrix products are counted, attention included. The model is on the meta device.
    """
    model.requires_grad_(False)  # the counter fails on tensors with gradients
    fused = fuse(model, form) if form else model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fused(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() / 2e9


def _symmetry(model: Any) -> str:
    output, name = "logits" if model.num_classes > 0 else "pooled features", model.group.upper()
    moved = "rotated or reflected" if Group.from_name(model.group).reflections else "rotated"
    maps = f"Its feature maps move with the image, under the group {name}."
    if model.is_invariant:
        return f"Its {output} do not change when the image is {moved} by an element of the group {name}. {maps}"
    if isinstance(model, EquivariantViT):
        maps = "Only the blocks of its first half are equivariant."
    return f"**Its {output} are NOT invariant: they change when the image is {moved}.** {maps}"


def _exact_sizes(model: Any, size: int) -> str:
    if isinstance(model, EquivariantViT) and not model.is_invariant:
        return "There are none: the blocks of the second half break the symmetry."
    group, sides = Group.from_name(model.group), [side for side in range(size, size + 200) if model.is_exact(side)]
    text = f"Rotations by 90 degrees and reflections in the group are exact at {size} x {size} pixels"
    if len(sides) > 1:
        text += f" and all n = {size % (sides[1] - size)} mod {sides[1] - size}, at other sizes approximate"
    if len(group.grid_elements) < group.order:
        text += "; the other rotations of the group are approximate at any size, since the pixel grid resamples"
    return text + "."
