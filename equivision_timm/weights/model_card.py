"""The model card of a publication: what the model is, how it is used, what is known about it, in Markdown for the Hub.

All that differs between models is asked of the model itself and of the table of released checkpoints; the text around
it is `model_card.md`. Nothing is computed: the models are on the meta device.
"""

from pathlib import Path
from string import Template
from textwrap import fill
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from equivision_timm.errors import one_line
from equivision_timm.groups import Group
from equivision_timm.models import EquivariantBackbone, EquivariantViT, fuse
from equivision_timm.models.variants import create
from equivision_timm.weights.released import Released, released

__all__ = ["complexity", "model_card"]


def model_card(model_name: str, repository: str, provenance: dict[str, str], has_classifier: bool = True) -> str:
    """The model card, Markdown with the Hub's metadata in front.

    Args:
        model_name: a model with weights, released ones or those of the package.
        repository: where they will be, 'organisation/name'.
        provenance: of the weights, a row each.
        has_classifier: whether the weights have the classifier that the model has by default.
    """
    entry = released().get(model_name)  # None: the package's own weights
    arguments: dict[str, Any] = {} if has_classifier else {"num_classes": 0}
    model = create(model_name, EquivariantBackbone, EquivariantViT, device="meta", **arguments).eval()
    cfg: Any = model.pretrained_cfg
    cost_size = cfg["input_size"][-1]
    parameters, gmacs = complexity(model_name, cost_size, **arguments)
    size = model.exact_sizes(cost_size)[1]
    fused: Any = fuse(model, "dense")  # plain convolutions, which know the meta device
    with torch.no_grad():
        features = fused.forward_features(torch.empty(1, model.in_chans, size, size, device="meta"))
    classifies = model.num_classes > 0
    reported = entry.reported if entry and has_classifier else {}
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        metadata=_metadata(entry, repository, cfg["license"], classifies, reported).to_yaml(),
        name=repository.split("/")[1],
        description=fill(model_entrypoint(model_name).__doc__ or "", 120),
        symmetry=fill(_symmetry(model), 120),
        origin=_origin(entry, cfg),
        repository=repository,
        output="logits" if classifies else "vector",
        size=size,
        shape=list(features.shape),
        features=fill(_features(model, features), 120),
        parameters=f"{parameters / 1e6:.4g}",
        cost_size=cost_size,
        gmacs=f"{gmacs:.4g}",
        reported=_reported_rows(entry, reported),
        exact=fill(_exact_sizes(model, size), 120),
        provenance="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in provenance.items()),
        license=f"{'That of the original' if entry else 'That of the package'}: {cfg['license']}.",
        citation=entry.citation if entry else "",
    )


def complexity(model_name: str, size: int = 224, **arguments: Any) -> tuple[int, float]:
    """Number of parameters, and 10^9 multiply-accumulates of one image of size x size pixels; `arguments` of the model.

    Counted with PyTorch's flop counter on the network of dense convolutions: convolutions and
    matrix products, attention included. Nothing is computed: the tensors are on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(model_name, **arguments).eval()
        parameters = sum(p.numel() for p in model.parameters())
        fused = fuse(model.requires_grad_(False), "dense")  # the counter follows what asks for gradients
        with FlopCounterMode(display=False) as counter:
            fused(torch.empty(1, 3, size, size))
    return parameters, counter.get_total_flops() / 2 / 1e9


def _metadata(
    entry: Released | None, repository: str, license: str, classifies: bool, reported: dict[str, float]
) -> ModelCardData:
    task = "image-classification" if classifies else "image-feature-extraction"
    return ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "equivariance"],
        datasets=["imagenet-1k" if entry else "ylecun/mnist"],
        model_name=repository.split("/")[1],
        eval_results=[_reported(entry, kind) for kind in reported] if entry and reported else None,
    )


def _symmetry(model: EquivariantBackbone | EquivariantViT) -> str:
    """What does not change under the group, and what moves with the image."""
    kind, output = ("classifier", "logits") if model.num_classes > 0 else ("encoder", "pooled features")
    group = Group.from_name(model.group)
    moved, move = ("rotated or reflected", "rotate and reflect") if group.reflections else ("rotated", "rotate")
    if group.order == 1:
        return f"An image {kind} without symmetry: the plain twin of equivariant ones, to compare them with."
    if model.is_invariant:
        return (
            f"An image {kind} whose {output} do not change when the image is {moved} by an element of the group "
            f"{model.group.upper()}, and whose feature maps {move} along."
        )
    change = f"An image {kind}. **Its {output} are NOT invariant: they change when the image is {moved}.**"
    if isinstance(model, EquivariantViT):
        return f"{change} The blocks of its first half alone are equivariant."
    return f"{change} Its feature maps {move} with the image, under the group {model.group.upper()}."


def _origin(entry: Released | None, cfg: dict) -> str:
    if entry is None:
        return (
            "The weights were trained with the package `equivision_timm`, which carries them, for tests and\n"
            f"demonstrations: {cfg['description']}."
        )
    return (
        f"The weights are those of [{entry.project}]({entry.source}), converted for\n"
        "[timm](https://github.com/huggingface/pytorch-image-models) with the package `equivision_timm`."
    )


def _features(model: EquivariantBackbone | EquivariantViT, features: torch.Tensor) -> str:
    """How the channels of `forward_features` are to be read."""
    if features.ndim == 3:
        return "The features are tokens: the class token first, then one for each patch, row by row."
    level = model.feature_info[-1]
    return (
        f"The features are {level['num_fields']} regular fields of {Group.from_name(model.group).order} channels, one "
        "channel for each element of the group."
    )


def _exact_sizes(model: EquivariantBackbone | EquivariantViT, size: int) -> str:
    group = Group.from_name(model.group)
    if group.order == 1:
        return "There is no symmetry."
    if isinstance(model, EquivariantViT) and not model.is_invariant:
        return "There are none: the blocks of the second half break the symmetry."
    sides = [side for side in range(size, size + 200) if model.is_exact(side)]
    if len(sides) == 1:
        text = (
            f"Rotations by 90 degrees and reflections in the group are exact, to rounding. The model takes {size} x "
            f"{size} pixels, with `dynamic_img_size=True` every size that the patches divide."
        )
    else:
        step = sides[1] - sides[0]
        text = (
            "Rotations by 90 degrees and reflections in the group are exact where every stride sees an odd size: "
            f"images of n x n pixels with n = {size % step} mod {step}, such as {sides[0]} or {sides[1]}. At other "
            f"sizes, {size - 1} among them, they hold approximately."
        )
    if len(group.grid_elements) == group.order:
        return text
    return f"{text} The other rotations of the group hold approximately at any size: the pixel grid resamples."


def _reported_rows(entry: Released | None, reported: dict[str, float]) -> str:
    if entry is None or not reported:
        return ""
    rows = [f"| Reported {_KINDS[k]} on ImageNet-1k at 224 x 224 | {100 * v:.1f} % |\n" for k, v in reported.items()]
    source = f"The accuracies are those that [{entry.project}]({entry.source}) reports for its checkpoint."
    return f"{''.join(rows)}\n{source}\n"


def _reported(entry: Released, kind: str) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="imagenet-1k",
        dataset_name="ImageNet-1k",
        metric_type="accuracy",
        metric_name=_KINDS[kind],
        metric_value=entry.reported[kind],
        source_name=f"{entry.project}, as reported",
        source_url=entry.source,
    )


_KINDS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "linear": "top-1 accuracy of a linear classifier on frozen features",
    "knn": "top-1 accuracy of nearest neighbours of frozen features",
}


def _cell(text: str) -> str:
    """Text as text in a table of Markdown: neither line breaks nor markup."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"
