"""Frozen invariant features in scikit-learn: a linear probe and k nearest neighbours, tested on rotated images.

Features are the pooled map of a ResNet, or the class token of a vision transformer. The networks were trained on
MNIST's digits; the images are scikit-learn's digits of the UCI repository (8 x 8 pixels). Classifiers are fitted on
upright digits, and tested on upright, rotated and reflected ones: features of D4 are invariant under both, those of C8
under rotations, those of c1 under neither.

    pip install '.[examples]'
    python scripts/examples/probe.py test_d4vit test_c8resnet test_c1resnet
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.rotation import rotate

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f"{angle}°": partial(rotate, degrees=angle) for angle in (0, 45, 90, 180, 270)},
    "left-right": partial(torch.flip, dims=(-1,)),
    "upside down": partial(torch.flip, dims=(-2,)),
}


def load_images(config: dict) -> tuple[torch.Tensor, list[int]]:
    """The digits, resized and normalised for a model: [1797, C, H, W], and their classes."""
    digits = load_digits()
    channels, height, width = config["input_size"]
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    images = F.interpolate(images, (height, width), mode="bilinear").expand(-1, channels, -1, -1)
    mean, std = (torch.tensor(config[key])[:channels, None, None] for key in ("mean", "std"))
    return (images - mean) / std, digits.target.tolist()


@torch.inference_mode()
def features(model: torch.nn.Module, images: torch.Tensor):
    """Inputs of the classifier [N, head_hidden_size], invariant (up to rounding) under the group of the model."""
    batches = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(100)]
    return torch.cat(batches).numpy()


def probe(model: torch.nn.Module, count: int = 1797, views: Iterable[str] = VIEWS) -> dict[str, dict[str, float]]:
    """{classifier: {view: accuracy}}, fitted on the first two thirds upright, tested on the rest in every view."""
    images, classes = load_images(timm.data.resolve_data_config(model=model))
    images, classes, train = images[:count], classes[:count], 2 * count // 3
    classifiers = {
        "linear probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "5 nearest neighbours": KNeighborsClassifier(5, metric="cosine"),
    }
    upright = features(model, images[:train])
    tests = {view: features(model, VIEWS[view](images[train:])) for view in views}
    accuracies = {}
    for name, classifier in classifiers.items():
        classifier.fit(upright, classes[:train])
        accuracies[name] = {view: classifier.score(test, classes[train:]) for view, test in tests.items()}
    return accuracies


def main(names: list[str]) -> None:
    for name in names:
        for classifier, accuracies in probe(timm.create_model(name, pretrained=True).eval()).items():
            row = "  ".join(f"{view}: {accuracy:.1%}" for view, accuracy in accuracies.items())
            print(f"{name:16} {classifier:22} {row}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["test_d4vit", "test_c8resnet", "test_c1resnet"])
