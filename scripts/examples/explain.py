"""Explanations that rotate with the image: Grad-CAM and integrated gradients of an equivariant and of a plain network.

For an equivariant network the explanation of the rotated image is the rotated explanation, exactly for multiples of 90
degrees and exact image sizes: both methods consist of gradients of an invariant number, and sum over channels, which
the group permutes. Printed is the largest difference after a rotation by 90 degrees, relative to the largest value, in
double precision: in single precision rounding decides which ReLUs are open. A constant background would cause ties in
max pooling, whose gradient goes to the first pixel; a little noise, as of every camera, breaks them.

    pip install .
    python scripts/examples/explain.py test_c8resnet test_c1resnet

Sources: Selvaraju et al., Grad-CAM (2017); Sundararajan et al., Axiomatic Attribution for Deep Networks (2017).
"""

import sys
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli.demo import load_digits
from equivision_timm.rotation import rotate

Explain = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def digits(model: torch.nn.Module, count: int = 10) -> torch.Tensor:
    """Handwritten digits as inputs of the model, [count, 3, H, W], on a constant background."""
    config = timm.data.resolve_data_config(model=model)
    channels, height, width = config["input_size"]
    images = F.interpolate(load_digits()[0][:count, None] / 255, (height, width), mode="bilinear")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (images.expand(-1, channels, -1, -1) - mean) / std


def with_noise(images: torch.Tensor, sigma: float = 0.02) -> torch.Tensor:
    """Images in double precision with normal noise, the same at every call."""
    return images.double() + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def grad_cam(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """relu(sum_c w_c A_c), w_c = mean over space of d logit / d A_c, A the last map; [B, 1, H, W]."""
    maps = model.forward_features(images).detach().requires_grad_()  # [B, C, h, w]
    logits = model.forward_head(maps).gather(1, classes[:, None])
    (gradient,) = torch.autograd.grad(logits.sum(), maps)
    heat = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()  # [B, 1, h, w]
    return F.interpolate(heat.detach(), images.shape[2:], mode="bicubic", align_corners=True)


def integrated_gradients(
    model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor, steps: int = 16
) -> torch.Tensor:
    """sum over channels of (x - x_0) mean_a d logit(x_0 + a (x - x_0)) / dx, x_0 = 0; [B, 1, H, W]."""
    total = torch.zeros_like(images)
    for step in range(steps):
        point = (images * (step + 0.5) / steps).requires_grad_()
        (gradient,) = torch.autograd.grad(model(point).gather(1, classes[:, None]).sum(), point)
        total += gradient / steps
    return (images * total).sum(1, keepdim=True)


def error(explain: Explain, model: torch.nn.Module, images: torch.Tensor, degrees: float = 90) -> float:
    """max |explain(g x) - g explain(x)| / max |explain(x)|, for the classes predicted upright."""
    with torch.no_grad():
        classes = model(images).argmax(1)
    upright, rotated = (explain(model, x, classes) for x in (images, rotate(images, degrees)))
    return ((rotated - rotate(upright, degrees)).abs().max() / upright.abs().max()).item()


def main(names: list[str]) -> None:
    for name in names:
        model = timm.create_model(name, pretrained=True).eval().double()
        images = with_noise(digits(model))
        for explain in (grad_cam, integrated_gradients):
            print(f"{name:16} {explain.__name__:22} {error(explain, model, images):.1e}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["test_c8resnet", "test_c1resnet"])
