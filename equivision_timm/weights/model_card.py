"""Model card of a publication, by timm's own writer of cards, and the cost of a model.

Everything that differs between models is read from the model, on the meta device, and from the table of released
checkpoints.
"""

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
{features}
Keywords such as `num_classes`, `in_chans`, `global_pool` and `features_only` work as for any timm model."""


def model_card(model_name: str, repository: str, provenance: dict[str, str], has_classifier: bool = True) -> str:
    """The model card, in Markdown with the Hub's metadata, of a model with released weights.

    Args:
        model_name: e.g. 'c8resnet50'.
        repository: 'organisation/name'.
        provenance: of the weights, a line each.
        has_classifier: whether the weights include a classifier.
    """
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
    kept = "tokens: the class token first, then one for each patch, row by row."
    if features.ndim == 4:
        kept = f"{model.feature_info[-1]['num_fields']} regular fields, with one channel for each element of the group."
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
            repository=repository,
            output="logits" if classifies else "vector",
            size=size,
            shape=list(features.shape),
            features=f"The features are {kept}",
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
    kind, output = ("classifier", "logits") if model.num_classes > 0 else ("encoder", "pooled features")
    group, name = Group.from_name(model.group), model.group.upper()
    moved, move = ("rotated or reflected", "rotate and reflect") if group.reflections else ("rotated", "rotate")
    if model.is_invariant:
        return (
            f"An image {kind} whose {output} do not change when the image is {moved} by an element of the group "
            f"{name}, and whose feature maps {move} along."
        )
    maps = f"Its feature maps {move} with the image, under the group {name}."
    if isinstance(model, EquivariantViT):
        maps = "Only the blocks of its first half are equivariant."
    return f"An image {kind}. **Its {output} are NOT invariant: they change when the image is {moved}.** {maps}"


def _exact_sizes(model: Any, size: int) -> str:
    if isinstance(model, EquivariantViT) and not model.is_invariant:
        return "There are none: the blocks of the second half break the symmetry."
    group, text = Group.from_name(model.group), "Rotations by 90 degrees and reflections in the group are exact"
    sides = [side for side in range(size, size + 200) if model.is_exact(side)]
    if len(sides) == 1:
        text += f", to rounding. The model takes {size} x {size} pixels, with `dynamic_img_size=True` every size that "
        text += "the patches divide."
    else:
        step = sides[1] - sides[0]
        text += f" for images of n x n pixels with n = {size % step} mod {step}, such as "
        text += f"{sides[0]} or {sides[1]}. At other sizes, such as {size - 1}, they hold approximately."
    if len(group.grid_elements) < group.order:
        text += " The other rotations of the group hold approximately at any size: the pixel grid resamples."
    return text
