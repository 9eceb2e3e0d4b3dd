"""PyTorch's transforms of a model, as they are and inside `torch.compile`."""

import timm
import torch

import equivision_timm  # noqa: F401  registers the models

X = torch.rand(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))


def _loss(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x,)).square().sum()


FUNCTIONS = {
    "grad of single images": lambda m, p: torch.func.vmap(
        torch.func.grad(lambda p, x: _loss(m, p, x[None])), in_dims=(None, 0)
    )(p, X),
    "jvp": lambda m, p: {"": torch.func.jvp(m, (X,), (X.flip(0),))[1]},
    "jacrev": lambda m, p: {"": torch.func.jacrev(lambda x: m(x[None])[0])(X[0])},
}


def largest_differences(name: str, function: str) -> dict[str, float] | str:
    """For each tensor the largest difference that compilation makes, relative to the largest entry; or the error."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, zero_init_last=False).eval()  # no gradient is zero
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    expected = FUNCTIONS[function](model, parameters)
    try:
        found = torch.compile(lambda p: FUNCTIONS[function](model, p), backend="aot_eager")(parameters)
    except RuntimeError as error:
        return str(error)
    assert found.keys() == expected.keys()
    return {key: ((found[key] - value).abs().max() / value.abs().max()).item() for key, value in expected.items()}
