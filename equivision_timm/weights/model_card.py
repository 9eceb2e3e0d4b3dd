"""Model card of a publication, in Markdown for the Hub.

The text is in `model_card.md`. Everything that differs between models is read from the model, on the meta device, and
from the table of released checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path
from string import Template
from textwrap import fill
from typing import Any

import timm
import torch
import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.errors import one_line
from equivision_timm.groups import Group
from equivision_timm.models import EquivariantConvNeXt, EquivariantViT, fuse
from equivision_timm.weights.folder import Model, create_ours
from equivision_timm.weights.released import Released, released

__all__ = ["complexity", "gmacs", "model_card"]


_KINDS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "linear": "top-1 accuracy of a linear classifier on frozen features",
    "knn": "top-1 accuracy of nearest neighbours of frozen features",
}


def model_card(model_name: str, repository: str, provenance: dict[str, str], has_classifier: bool = True) -> str:
    """The model card with the Hub's metadata, of a model with released weights or with weights in the package.

    Args:
        model_name: e.g. 'c8resnet50'.
        repository: 'organisation/name'.
        provenance: of the weights, a row each.
        has_classifier: whether the weights include a classifier.
    """
    entry = released().get(model_name)  # None: weights of the package
    arguments: dict[str, Any] = {} if has_classifier else {"num_classes": 0}
    model = create_ours(model_name, device="meta", **arguments).eval()
    cfg: Any = model.pretrained_cfg
    classifies, cost_size = model.num_classes > 0, cfg["input_size"][-1]
    parameters, dense = complexity(model_name, cost_size, **arguments)
    size = model.exact_sizes(cost_size)[1]
    with torch.no_grad():
        features = model.forward_features(torch.empty(1, model.in_chans, size, size, device="meta"))
    reported = entry.reported if entry and has_classifier else {}
    task = "image-classification" if classifies else "image-feature-extraction"
    metadata = ModelCardData(
        license=cfg["license"],
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "equivariance"],
        datasets=["imagenet-1k" if entry else "ylecun/mnist"],
        model_name=repository.split("/")[1],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="imagenet-1k",
                dataset_name="ImageNet-1k",
                metric_type="accuracy",
                metric_name=_KINDS[kind],
                metric_value=value,
                source_name=f"{entry.project}, as reported",
                source_url=entry.source,
            )
            for kind, value in reported.items()
            if entry
        ]
        or None,
    )
    accuracies = [
        f"| Reported {_KINDS[k]} on ImageNet-1k at 224 x 224 | {100 * v:.1f} % |" for k, v in reported.items()
    ]
    if entry and reported:
        accuracies += ["", f"The accuracies are those that [{entry.project}]({entry.source}) reports.", ""]
    return Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")).substitute(
        metadata=metadata.to_yaml(),
        name=repository.split("/")[1],
        description=fill(model_entrypoint(model_name).__doc__ or "", 120),
        symmetry=fill(_symmetry(model), 120),
        origin=_origin(entry, cfg),
        repository=repository,
        output="logits" if classifies else "vector",
        size=size,
        shape=list(features.shape),
        features=fill(
            "The features are tokens: the class token first, then one for each patch, row by row."
            if features.ndim == 3
            else f"The features are {model.feature_info[-1]['num_fields']} regular fields of "
            f"{Group.from_name(model.group).order} channels, one channel for each element of the group.",
            120,
        ),
        parameters=f"{parameters / 1e6:.4g}",
        cost_size=cost_size,
        gmacs=f"{dense:.4g}",
        reported="\n".join(accuracies),
        exact=fill(_exact_sizes(model, size), 120),
        provenance="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in provenance.items()),
        license=f"{'That of the original' if entry else 'That of the package'}: {cfg['license']}.",
        citation=entry.citation if entry else "",
    )


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


def _symmetry(model: Model) -> str:
    kind, output = ("classifier", "logits") if model.num_classes > 0 else ("encoder", "pooled features")
    group, name = Group.from_name(model.group), model.group.upper()
    moved, move = ("rotated or reflected", "rotate and reflect") if group.reflections else ("rotated", "rotate")
    if group.order == 1:
        return f"An image {kind} without symmetry: the plain twin of equivariant ones, for comparison."
    if model.is_invariant:
        return (
            f"An image {kind} whose {output} do not change when the image is {moved} by an element of the group "
            f"{name}, and whose feature maps {move} along."
        )
    maps = f"Its feature maps {move} with the image, under the group {name}."
    if isinstance(model, EquivariantViT):
        maps = "Only the blocks of its first half are equivariant."
    return f"An image {kind}. **Its {output} are NOT invariant: they change when the image is {moved}.** {maps}"


def _origin(entry: Released | None, cfg: dict) -> str:
    if entry is None:
        return (
            "The weights were trained with the package `equivision_timm` and are part of it, for tests and\n"
            f"demonstrations: {cfg['description']}."
        )
    return (
        f"The weights are those of [{entry.project}]({entry.source}), converted for\n"
        "[timm](https://github.com/huggingface/pytorch-image-models) with the package `equivision_timm`."
    )


def _exact_sizes(model: Model, size: int) -> str:
    group, text = Group.from_name(model.group), "Rotations by 90 degrees and reflections in the group are exact"
    if group.order == 1:
        return "There is no symmetry."
    if isinstance(model, EquivariantViT) and not model.is_invariant:
        return "There are none: the blocks of the second half break the symmetry."
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


def _cell(text: str) -> str:
    """Text for a table in Markdown, without line breaks and markup."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"
