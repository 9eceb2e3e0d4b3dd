"""Original equivision state dict -> state dict of our model of the same name. Pure: no input or output of files.

A convolution's coefficients are one flat vector in the order (output field o, input field i, basis element b), our
`weight` [out_fields, in_fields, n_basis, 1]: a reshape, where the author's basis is ours. What else the checkpoint
carries says whether it is:

- `sampled_basis` B' [n_basis, |G|, H, k^2], the author's basis: sum_b w'_b B'_b = sum_b w_b B_b gives w = w' T with
  T B = B', by least squares, exact since both span the same space;
- `filter` K [O |G|, I H, k, k] alone: sum_b w_b B_b = K gives w, likewise;
- neither: the bases of C_N and D_1 are the same everywhere; those of D_4 and D_8 differ by signs (`sign_groups.py`),
  which the caller must know (`signs.py` finds them): w_b = s_b w'_b.

`weights`, norms and classifier are needed, `filter`, `sampled_basis` and index tables taken where they are. Where a
filter and coefficients are there, they must say the same: bases differ by signs alone where no `sampled_basis` says
more. Everything is checked before it is cast to float32.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch

from equivision_timm.groups import Group
from equivision_timm.kernel_basis import load_kernel_basis, table_key
from equivision_timm.layers import ConvNormAct, SteerableConv2d
from equivision_timm.models import EquivariantResNet, model_names
from equivision_timm.models.variants import create
from equivision_timm.weights.change_of_basis import solve, translate_basis
from equivision_timm.weights.equivision.sign_groups import element_signs, sign_groups

__all__ = ["Conversion", "convert_original", "convert_with_details", "fitting_models"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and how it came about.

    Attributes:
        state_dict: exactly the entries of our model, in its order, float32.
        basis: what fixed the coefficients: 'sampled_basis', 'filter', 'signs', 'canonical' (taken as they are: the
            basis of C_N and D_1, or D_4 and D_8 without `signs`).
        residual: largest relative residual of the least squares, 0 where there were none.
        dtypes: types other than float32 that were converted.
    """

    state_dict: dict[str, torch.Tensor]
    basis: str
    residual: float
    dtypes: tuple[str, ...]


def convert_original(
    state_dict: dict[str, torch.Tensor], model_name: str, signs: str | None = None
) -> dict[str, torch.Tensor]:
    """The weights of an original network as those of ours; see `convert_with_details`, whose `state_dict` this is.

    Example:
        >>> convert_original({"fc.bias": torch.zeros(1000)}, "c4resnet18")
        Traceback (most recent call last):
        ValueError: this is no checkpoint of c4resnet18: 121 entries are missing (conv1.weights, ...)...
    """
    return convert_with_details(state_dict, model_name, signs).state_dict


def convert_with_details(state_dict: dict[str, torch.Tensor], model_name: str, signs: str | None = None) -> Conversion:
    """Convert the weights of an original network and say how.

    Args:
        state_dict: names of the original, `conv1.weights`, `layer1.0.bn1.batch_norm_[8].weight`, `fc.bias`, ...
        model_name: the model, e.g. 'c8resnet50'.
        signs: the sign pattern of the author's machine (D_4, D_8, where the checkpoint does not carry its basis): a
            name of `known_patterns` or a string of '+' and '-'; None takes the coefficients to be in our basis.

    Raises:
        ValueError: names are missing, left over or of another shape; values of another type than float, beyond
            float32, or impossible; the basis or the filter is not one of this group, or contradicts the coefficients;
            `signs` where there are none to choose.
    """
    entries = _entries_of(model_name)
    _check_names(state_dict, entries, model_name)
    _check_shapes(state_dict, entries, model_name)
    for name, value in state_dict.items():
        _check_values(name, value)

    with torch.device("meta"):
        model = create(model_name, EquivariantResNet)
    convs = {name: module.conv for name, module in model.named_modules() if isinstance(module, ConvNormAct)}
    original_names = {entry.ours: name for name, entry in entries.items() if entry.ours}
    sources = {_source(state_dict, original_names[f"{name}.conv.weight"]) for name in convs}
    if signs is not None and sources != {"signs"}:
        raise ValueError(f"the checkpoint carries its basis ({', '.join(sorted(sources))}): leave signs={signs!r} out")
    if sign_groups(model.group) and len(sources) > 1 and "signs" in sources:
        raise ValueError(
            f"some convolutions of this {model_name} checkpoint carry their basis and some do not, so that their signs "
            "may differ: save all of sampled_basis or none"
        )
    elements = element_signs(model.group, signs) if signs is not None else {}
    if signs is None and "filter" in sources and sign_groups(model.group):
        named = {original_names[f"{name}.conv.weight"]: conv for name, conv in convs.items()}
        elements = element_signs(model.group, _signs_by_filters(state_dict, named, model.group))

    converted, residual = {}, 0.0
    for name, target in model.state_dict().items():
        value = state_dict[original_names[name]]
        if name.endswith(".conv.weight"):
            conv = convs[name.removesuffix(".conv.weight")]
            weight = value.detach().to(torch.float32).reshape(target.shape[:3])  # [out_fields, in_fields, n_basis]
            weight, error = _to_canonical(weight, state_dict, original_names[name], conv, elements)
            if not weight.isfinite().all():
                raise ValueError(f"{original_names[name]} in our basis is beyond the range of float32: it is damaged")
            residual = max(residual, error)
            value = weight.unsqueeze(-1)  # [out_fields, in_fields, n_basis, 1]
        converted[name] = value.detach().to(target.dtype).clone()
    dtypes = {str(v.dtype).removeprefix("torch.") for v in state_dict.values() if v.is_floating_point()} - {"float32"}
    basis = "+".join(sorted(sources)) if sources != {"signs"} else "canonical" if signs is None else "signs"
    return Conversion(converted, basis, residual, tuple(sorted(dtypes)))


@dataclass(frozen=True)
class _Entry:
    """One name of the original: its shape, what it is called in our model (None: dropped), and whether it is needed."""

    shape: tuple[int, ...]
    ours: str | None = None
    needed: bool = False


@cache
def _entries_of(model_name: str) -> dict[str, _Entry]:
    """Every name that a checkpoint of the original network may hold."""
    with torch.device("meta"):
        model = create(model_name, EquivariantResNet)
    order, entries = Group.from_name(model.group).order, {}
    for name, module in model.named_modules():
        if not isinstance(module, ConvNormAct):
            continue
        conv, weight = module.conv, module.conv.weight
        parent, _, last = name.rpartition(".")
        conv_name, norm_name = (
            (f"{name}.0", f"{name}.1")
            if last == "downsample"
            else (name, f"{parent}.{last}".lstrip(".").replace("conv", "bn"))
        )
        outputs, inputs, size = weight.shape[0], weight.shape[1] * _inputs(conv), conv.kernel_size
        entries[f"{conv_name}.weights"] = _Entry((weight[..., 0].numel(),), f"{name}.conv.weight", needed=True)
        entries[f"{conv_name}.filter"] = _Entry((outputs * order, inputs, size, size))
        basis_shape = (weight.shape[2], order, _inputs(conv), size**2)
        entries[f"{conv_name}._basisexpansion.sampled_basis"] = _Entry(basis_shape)
        entries[f"{norm_name}.indices_{order}"] = _Entry((2,))
        for field, value in module.norm.per_field.state_dict().items():
            ours = f"{name}.norm.per_field.{field}"
            entries[f"{norm_name}.batch_norm_[{order}].{field}"] = _Entry(tuple(value.shape), ours, needed=True)
    entries |= {f"gpool.{side}_indices_{order}": _Entry((2,)) for side in ("in", "out")}
    entries |= {f"fc.{name}": _Entry(tuple(v.shape), f"fc.{name}", True) for name, v in model.fc.state_dict().items()}
    return entries


def _inputs(conv: SteerableConv2d) -> int:
    """H, the channels of one input field."""
    return 1 if conv.input_type == "trivial" else conv.order


def _plain(name: str) -> str:
    """The name without the irreps that escnn writes into that of a sampled basis."""
    return re.sub(r"_basisexpansion\.block_expansion_\([^)]*\)", "_basisexpansion", name)


def _check_names(state_dict: dict[str, torch.Tensor], entries: dict[str, _Entry], model_name: str) -> None:
    found: dict[str, str] = {}
    for name in state_dict:
        if _plain(name) in found:
            raise ValueError(
                f"two entries for {_plain(name)}: {found[_plain(name)]!r} and {name!r}; remove one of them"
            )
        found[_plain(name)] = name
    missing = [name for name, entry in entries.items() if entry.needed and name not in found]
    left_over = [name for name in state_dict if _plain(name) not in entries]
    if missing or left_over:
        parts = [f"{len(missing)} entries are missing ({_some(missing)})"] if missing else []
        parts += [f"{len(left_over)} do not belong to it ({_some(left_over)})"] if left_over else []
        raise ValueError(f"this is no checkpoint of {model_name}: {', '.join(parts)}{_suggest(state_dict, model_name)}")


def _check_shapes(state_dict: dict[str, torch.Tensor], entries: dict[str, _Entry], model_name: str) -> None:
    for name, value in state_dict.items():
        expected = entries[_plain(name)].shape
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but {model_name} needs {expected}"
                f"{_suggest(state_dict, model_name)}"
            )


def _check_values(name: str, value: torch.Tensor) -> None:
    """Whether float32 can hold the values, and they are possible ones."""
    dtype, kind = str(value.dtype).removeprefix("torch."), name.rpartition(".")[2]
    if kind == "num_batches_tracked" or "indices_" in kind:
        if value.dtype not in _FLOATS + _INTEGERS or not (value >= 0).all() or (value.double() % 1).any():
            raise ValueError(f"{name} holds {_extremes(value)} ({dtype}), where a count is needed: it is damaged")
        return
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name} is of type {dtype}, where floating-point numbers are needed: save it as float32")
    if not (value.abs() <= torch.finfo(torch.float32).max).all():  # NaN, too
        raise ValueError(f"{name} holds {_extremes(value)} ({dtype}), beyond the range of float32: it is damaged")
    if kind == "running_var" and (value < 0).any():
        raise ValueError(f"{name} holds {_extremes(value)}, and variances are not negative: it is damaged")
    if (kind in ("weights", "filter", "sampled_basis") or name == "fc.weight") and not value.to(torch.float32).any():
        raise ValueError(f"{name} is zero everywhere: it is damaged, or was never trained")


def _extremes(value: torch.Tensor) -> str:
    if value.is_complex():
        return "complex numbers"
    low, high = value.double().aminmax()
    return f"values from {low:g} to {high:g}"


def _some(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _suggest(state_dict: dict[str, torch.Tensor], model_name: str) -> str:
    fitting = fitting_models(state_dict, model_name)
    return f"; it fits {' or '.join(fitting)}" if fitting else ""


def fitting_models(state_dict: dict[str, torch.Tensor], model_name: str) -> list[str]:
    """Which other models the names and shapes fit, of those that the original's network can be."""
    shapes = {_plain(name): tuple(value.shape) for name, value in state_dict.items()}
    fitting = []
    for other in model_names(EquivariantResNet):
        original = re.fullmatch(r"(?:test_)?([cd][148])resnet(?:18|50|101)?(?:_fast)?", other)
        if other == model_name or original is None:
            continue
        order = Group.from_name(original[1]).order
        if f"bn1.batch_norm_[{order}].weight" not in shapes:
            continue
        entries = _entries_of(other)
        needed = {name for name, entry in entries.items() if entry.needed}
        if needed <= set(shapes) <= set(entries) and all(entries[name].shape == shapes[name] for name in shapes):
            fitting.append(other)
    return fitting


def _source(state_dict: dict[str, torch.Tensor], name: str) -> str:
    """What the checkpoint says about the basis of the convolution whose coefficients are called `name`."""
    if _sampled_basis(state_dict, name) is not None:
        return "sampled_basis"
    return "filter" if name.replace(".weights", ".filter") in state_dict else "signs"


def _sampled_basis(state_dict: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    prefix = name.removesuffix("weights") + "_basisexpansion."
    return next((value for key, value in state_dict.items() if key.startswith(prefix)), None)


def _to_canonical(
    weight: torch.Tensor, state_dict: dict[str, torch.Tensor], name: str, conv: SteerableConv2d, elements: dict
) -> tuple[torch.Tensor, float]:
    """Coefficients w' [out_fields, in_fields, n_basis] in the author's basis -> w in ours, and the residual."""
    basis = load_kernel_basis(conv.kernel).sample()
    theirs, filters = _sampled_basis(state_dict, name), state_dict.get(name.replace(".weights", ".filter"))
    if theirs is not None:
        translation, residual = translate_basis(theirs, basis, name)
        weight = (weight.double() @ translation).float()
        if filters is not None:
            _check_filter(filters, weight, basis, name)
        return weight, residual
    if filters is not None:
        solved, residual = _coefficients_of(filters, basis, name)
        _check_filter(filters, weight * elements.get(table_key(conv.kernel), 1.0), basis, name)
        return solved, residual
    return weight * elements.get(table_key(conv.kernel), 1.0), 0.0


def _signs_by_filters(state_dict: dict[str, torch.Tensor], convs: dict[str, SteerableConv2d], group: str) -> str:
    """The sign pattern under which coefficients and filters agree best, over all convolutions {name: convolution}."""
    products: dict[tuple[str, int], float] = {}
    for name, conv in convs.items():
        if _source(state_dict, name) != "filter":
            continue
        basis = load_kernel_basis(conv.kernel).sample()
        solved, _ = _coefficients_of(state_dict[name.replace(".weights", ".filter")], basis, name)
        product = (solved * state_dict[name].float().view_as(solved)).sum((0, 1))  # [n_basis]
        for index, value in enumerate(product.tolist()):
            element = (table_key(conv.kernel), index)
            products[element] = products.get(element, 0.0) + value
    sums = [sum(products.get(element, 0.0) for element in found.elements) for found in sign_groups(group)]
    return "".join("-" if total < 0 else "+" for total in sums)


def _coefficients_of(filters: torch.Tensor, basis: torch.Tensor, name: str) -> tuple[torch.Tensor, float]:
    """Coefficients [out_fields, in_fields, n_basis] in `basis` of an expanded filter, and the relative residual."""
    blocks = _blocks(filters, basis)  # [out_fields, in_fields, |G| * H * k^2]
    solved, residual = solve(blocks.flatten(0, 1).double(), basis.flatten(1), name, filters.dtype)
    return solved.float().unflatten(0, blocks.shape[:2]), residual


def _blocks(filters: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The filter of every pair of fields: [O * |G|, I * H, k, k] -> [O, I, |G| * H * k^2]."""
    order, inputs = basis.shape[1:3]
    blocks = filters.unflatten(0, (-1, order)).unflatten(2, (-1, inputs))  # [O, |G|, I, H, k, k]
    return blocks.transpose(1, 2).flatten(2)  # [O, I, |G|, H, k, k] -> [O, I, |G| * H * k^2]


def _check_filter(filters: torch.Tensor, weight: torch.Tensor, basis: torch.Tensor, name: str) -> None:
    """The filter that the checkpoint carries must be the one its coefficients give."""
    expected, found = weight @ basis.flatten(1).float(), _blocks(filters, basis).float()
    error = ((expected - found).abs().max() / found.abs().max().clamp_min(1e-30)).item()
    if not error <= 1e-3 + 4 * torch.finfo(filters.dtype).eps:
        raise ValueError(
            f"{name} and the filter beside it disagree (relative error {error:.1e}): the file mixes two states"
        )
