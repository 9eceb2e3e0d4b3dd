"""State dicts of equivision: written from those of this package, and with the buffers that escnn adds to them."""

import copy
import gzip
import json
from pathlib import Path

import timm
import torch

from equivision_timm.kernel_basis import load_kernel_basis
from equivision_timm.layers import ConvNormAct
from equivision_timm.layers.strategies.expand import expand_filter
from equivision_timm.models import EquivariantResNet
from equivision_timm.weights.signs import element_signs, known_patterns, sign_groups
from equivision_timm.weights.statistics import apply_signs

DATA = Path(__file__).parents[1] / "data" / "original_buffers.json.gz"


def buffers(name: str) -> dict[str, list[int]]:
    """{name: shape} of what an original network holds besides its published weights: filters, bases, index tables."""
    return json.loads(gzip.decompress(DATA.read_bytes()))[name]


def _names(unit: str) -> tuple[str, str]:
    """Names of a convolution and its norm: downsample.0 and .1, or conv2 and bn2."""
    if unit.endswith("downsample"):
        return f"{unit}.0", f"{unit}.1"
    return unit, unit.replace("conv", "bn")


def to_equivision(state: dict[str, torch.Tensor], order: int = 8) -> dict[str, torch.Tensor]:
    """Coefficients as flat vectors, norms with the order of the group in their names."""
    result = {}
    for name, value in state.items():
        unit, _, leaf = name.partition(".norm.per_field." if ".norm." in name else ".conv.weight")
        if name.startswith("fc."):
            result[name] = value
        elif leaf:
            result[f"{_names(unit)[1]}.batch_norm_[{order}].{leaf}"] = value
        else:
            result[f"{_names(unit)[0]}.weights"] = value.flatten()
    return result


def convolutions(name: str) -> dict[str, torch.nn.Module]:
    """{name of the coefficients in equivision: convolution of this package}."""
    with torch.device("meta"):
        model = timm.create_model(name)
    units = {key: module for key, module in model.named_modules() if isinstance(module, ConvNormAct)}
    return {f"{_names(key)[0]}.weights": module.conv for key, module in units.items()}


def with_buffers(name, state, signs=None, kinds=("filter", "sampled_basis", "indices")):
    """`state` as the original network in eval mode saves it, its basis with the signs of a pattern."""
    state = dict(state)
    for key, conv in convolutions(name).items():
        basis = load_kernel_basis(conv.kernel).sample().float()
        if signs:
            basis = basis * element_signs(conv.kernel, signs).view(-1, 1, 1, 1, 1)
        prefix = key.removesuffix("weights")
        for other, shape in buffers(name).items():
            if other == f"{prefix}filter" and "filter" in kinds:
                state[other] = expand_filter(state[key].view(conv.weight.shape), basis)
                assert list(state[other].shape) == shape
            elif other.startswith(f"{prefix}_basisexpansion") and "sampled_basis" in kinds:
                state[other] = basis.flatten(3)
                assert list(state[other].shape) == shape
    if "indices" in kinds:
        state |= {key: torch.zeros(shape) for key, shape in buffers(name).items() if "indices" in key}
    return state


@torch.no_grad()
def trained_elsewhere(
    name: str, pattern: str, crops: torch.Tensor, seed: int = 0, **options
) -> tuple[EquivariantResNet, EquivariantResNet]:
    """A network with the coefficients of a checkpoint from a machine with `pattern`, and the true network."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.norm.per_field.weight.uniform_(0.3, 0.7)
            module.norm.per_field.bias.normal_(0, 0.1)
            module.norm.per_field.momentum = 1.0
    truth = copy.deepcopy(model)
    if pattern:
        apply_signs(truth, pattern)
    truth.train()(crops)
    statistics = {key: value for key, value in truth.state_dict().items() if not key.endswith("conv.weight")}
    model.load_state_dict(statistics, strict=False)
    return model.eval(), truth.eval()


def mixed_statistics(crops: torch.Tensor) -> EquivariantResNet:
    """A D4 network with the statistics of half of its fields under one known pattern, of the others under another."""
    first, second = list(known_patterns("d4").values())[:2]
    model, _ = trained_elsewhere("test_d4resnet", first, crops, width=8)
    _, other = trained_elsewhere("test_d4resnet", second, crops, width=8)
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value[::2] = other.get_buffer(name)[::2]
    return model


def random_pattern(group: str, seed: int) -> str:
    bits = torch.randint(2, (len(sign_groups(group)),), generator=torch.Generator().manual_seed(seed))
    return "".join("-" if bit else "+" for bit in bits.tolist())
