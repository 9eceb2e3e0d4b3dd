"""Translator for checkpoints of ReDet (https://github.com/csuhan/ReDet) and mmrotate: ReResNets in e2cnn.

Each convolution holds its kernel basis, so that the signs are known. The backbone of a detector has no classifier.
"""

import torch

from equivision_timm.models import EquivariantResNet
from equivision_timm.models.pretrained import WeightsError
from equivision_timm.models.variants import create
from equivision_timm.weights.checkpoint import Translation
from equivision_timm.weights.escnn_format import translate_resnet
from equivision_timm.weights.released import released

__all__ = ["models", "translate"]


def models() -> list[str]:
    """Models whose checkpoints this format holds."""
    return [name for name, entry in released().items() if entry.format == "redet"]


def translate(state_dict: dict[str, torch.Tensor], model_name: str) -> Translation:
    """State dict of a model of this package from that of a classifier or a detector; WeightsError if it cannot be."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in state_dict) else ""
    renamed = {name.replace("head.fc.", f"{prefix}fc."): value for name, value in state_dict.items()}
    network = {name.removeprefix(prefix): value for name, value in renamed.items() if name.startswith(prefix)}
    dropped = len(state_dict) - len(network)
    network = {name: v for name, v in network.items() if not name.endswith(".filter")}  # follows from the coefficients
    keywords = {} if "fc.weight" in network else {"num_classes": 0}
    with torch.device("meta"):
        model = create(model_name, EquivariantResNet, **keywords)
    found = translate_resnet(network, model)
    if found.notes["basis_from"] != "sampled_basis":
        raise WeightsError("some convolutions have no sampled_basis: take the file as published")
    classifier = "none: the backbone of a detector" if keywords else "of all channels: NOT invariant"
    notes = {**found.notes, "classifier": classifier}
    if dropped:
        notes["dropped"] = f"{dropped} entries of the detector"
    return Translation(found.state_dict, keywords, notes)
