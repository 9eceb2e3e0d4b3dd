"""Original equivision state dict -> state dict of our model of the same name. No input or output of files."""

import re

import timm
import torch

__all__ = ["convert_original"]


def convert_original(state_dict: dict[str, torch.Tensor], model_name: str) -> dict[str, torch.Tensor]:
    """Rename and reshape the weights of an original network; its coefficients are taken to be in the canonical basis.

    A convolution's coefficients are one flat vector in the order (output field, input field, basis element), our
    `weight` [out_fields, in_fields, n_basis, 1]: a reshape. Norms and classifier carry over as they are.

    Args:
        state_dict: names of the original, `conv1.weights`, `layer1.0.bn1.batch_norm_[8].weight`, `fc.bias`, ...
        model_name: the model, e.g. 'c8resnet50'.

    Returns:
        Exactly the entries of our model, in its order.

    Raises:
        ValueError: names are missing, left over or of another shape.
    """
    with torch.device("meta"):
        expected = timm.create_model(model_name).state_dict()
    renamed = {_our_name(name): (name, value) for name, value in state_dict.items()}
    missing = [name for name in expected if name not in renamed]
    left_over = [original for name, (original, _) in renamed.items() if name not in expected]
    if missing or left_over:
        raise ValueError(
            f"this is no checkpoint of {model_name}: {len(missing)} entries are missing ({', '.join(missing[:3])}), "
            f"{len(left_over)} do not belong to it ({', '.join(left_over[:3])})"
        )
    converted = {}
    for name, ours in expected.items():
        original, value = renamed[name]
        coefficients = name.endswith(".conv.weight")  # flat (o, i, b) -> [out_fields, in_fields, n_basis, 1]
        if value.numel() != ours.numel() or not (coefficients or value.shape == ours.shape):
            raise ValueError(
                f"{original} has shape {tuple(value.shape)}, but {model_name} needs {tuple(ours.shape)}: "
                "is it a checkpoint of another model?"
            )
        converted[name] = value.reshape(ours.shape)
    return converted


def _our_name(name: str) -> str:
    """`layer2.0.bn1.batch_norm_[4].bias` -> `layer2.0.conv1.norm.per_field.bias`, and so on."""
    name = re.sub(r"downsample\.0\.weights$", "downsample.conv.weight", name)
    name = re.sub(r"conv(\d)\.weights$", r"conv\1.conv.weight", name)
    name = re.sub(r"downsample\.1\.batch_norm_\[\d+\]", "downsample.norm.per_field", name)
    return re.sub(r"bn(\d)\.batch_norm_\[\d+\]", r"conv\1.norm.per_field", name)
