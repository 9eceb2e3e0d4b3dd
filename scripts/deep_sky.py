"""Deep-sky objects in five classes: photographs of Debian's package `stellarium-data`, labelled by its own catalogue.

    apt-get download stellarium-data && dpkg-deb -x stellarium-data_*.deb stellarium    # 240 MB, or installed

The photographs have different licences and stay where they are. A photograph has the class of the largest object near
its centre; those where another class is nearly as large are left out, 494 of 555 stay. Photographs whose discs on the
sky overlap are on one side of a split. Networks see the inscribed disc, rotated by any angle in training, and tested
also at oblique angles.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from examples.galaxies import entries, photographs, placed
from PIL import Image
from real_training import ALL, ONE, Data, Row, Task, lit, pretrained, random_split, scratch

from equivision_timm.layers.views import shrink
from equivision_timm.rotation import inscribed_circle

FOLDER = Path("/usr/share/stellarium/nebulae/default")
SIZE = 448  # pixels of a side that are kept
CLASSES = {  # kinds in the catalogue
    "galaxy": {0, 1, 2, 3, 4},  # also active, radio, interacting ones and quasars
    "open cluster": {5, 6, 8},  # also associations
    "globular cluster": {7},
    "planetary nebula": {11, 26, 27},  # also possible ones and protoplanetary ones
    "nebula": {10, 12, 13, 14, 15, 16, 17, 18, 20, 23},  # dark, reflection, emission, HII, supernova remnant, ...
}


def class_of(offset: np.ndarray, extent: np.ndarray, classes: np.ndarray) -> int | None:
    """The class of a photograph by its objects [N]: offsets from the centre and diameters, in sides, and classes.

    Near the centre, the object that is largest and most central; None without one, and where another class has an
    object of a third of its size.
    """
    near = (offset < 0.4) & (extent > 0.05)
    if not near.any():
        return None
    offset, extent, classes = offset[near], extent[near].clip(max=1), classes[near]
    main = (extent - offset).argmax()
    return int(classes[main]) if (classes[extent >= 0.3 * extent[main]] == classes[main]).all() else None


def load(folder: Path = FOLDER) -> Data:
    """The photographs that have a class, squares of SIZE pixels; the stratum of a group is the class of its first."""
    classes = {kind: index for index, kinds in enumerate(CLASSES.values()) for kind in kinds}
    objects = [
        (math.degrees(right_ascension), math.degrees(declination), diameter, classes[kind])
        for _, right_ascension, declination, _, _, kind, _, diameter, *_ in entries(folder / "catalog.dat")
        if kind in classes
    ]
    sky, diameters, kinds = np.split(np.array(objects), [2, 3], axis=1)
    images, targets, centres, sides = [], [], [], []
    for photograph in photographs(folder):
        where, centre, matrix = placed(photograph, sky)
        side = abs(np.linalg.det(matrix)) ** -0.5  # degrees
        offset = np.nan_to_num(np.hypot(*(where - 0.5).T), nan=np.inf)
        target = class_of(offset, diameters[:, 0] / side, kinds[:, 0])
        if target is not None:
            image = Image.open(folder / photograph["imageUrl"]).convert("RGBA").convert("RGB").resize((SIZE, SIZE))
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            targets.append(target)
            centres.append(np.radians(centre))
            sides.append(side)
    groups = overlapping(np.array(centres), np.array(sides))
    targets = torch.tensor(targets)
    return Data(torch.stack(images), targets, targets[groups], groups)


def overlapping(centres: np.ndarray, sides: np.ndarray) -> torch.Tensor:
    """The first disc of those that each hangs together with, [N]; centres [N, 2] in radians, diameters in degrees."""
    (ra, dec), n = centres.T, len(centres)
    points = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])  # [3, N]
    distance = np.degrees(np.arccos((points.T @ points).clip(-1, 1)))
    touching = distance < (sides[:, None] + sides) / 2
    groups = np.arange(n)
    while not np.array_equal(groups, first := np.where(touching, groups, n).min(1)):
        groups = first
    return torch.from_numpy(groups)


def prepared(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> [N, 3, 2 size, 2 size] in 0 ... 1: twice the resolution, for rotations."""
    return torch.cat([shrink(batch.float(), 2 * size) / 255 for batch in images.split(64)])


def disc(x: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Prepared images [B, 3, 2n, 2n], rotated by `degrees` [B]: [B, 3, n, n] in 0 ... 1, black outside the disc."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    x = F.avg_pool2d(F.grid_sample(x, grid, padding_mode="border", align_corners=False), 2)
    return x * inscribed_circle(x)


def posed(x: torch.Tensor, degrees: float) -> torch.Tensor:
    """In -1 ... 1, all by the same angle."""
    return torch.cat([2 * disc(batch, torch.full((len(batch),), float(degrees))) - 1 for batch in x.split(64)])


def augmented(x: torch.Tensor, moved: bool, generator: torch.Generator) -> torch.Tensor:
    """With another brightness and contrast, rotated by any angle and reflected."""
    angle = 360 * torch.rand(len(x), generator=generator) * moved
    reflected = (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5) & moved
    x = lit(2 * disc(torch.where(reflected, x.flip(-1), x), angle) - 1, generator)
    return torch.where(inscribed_circle(x), x, -1)


def scores(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Accuracy, and its mean over the classes, per cent, of logits [N, K]."""
    right = (logits.argmax(1) == targets).double()
    classes = torch.stack([right[targets == target].mean() for target in targets.unique()])
    return [round(100 * right.mean().item(), 2), round(100 * classes.mean().item(), 2)]


network = partial(scratch, in_chans=3, num_classes=len(CLASSES))
ROWS = {
    "plain ResNet": Row(partial(network, "test_c1resnet"), epochs=60),
    "D4 ResNet": Row(partial(network, "test_d4resnet"), epochs=60),
    "C8 ResNet": Row(partial(network, "test_c8resnet"), epochs=60),
    "lite0, frozen": Row(partial(pretrained, len(CLASSES)), 129, epochs=0),
    "lite0, fine-tuned": Row(partial(pretrained, len(CLASSES)), 129, epochs=20, learning_rate=2e-3, layer_decay=0.85),
}
TASK = Task(
    title="Deep-sky objects",
    text="494 photographs of Debian's `stellarium-data` in five classes by its catalogue (galaxies 208, nebulae 90, "
    "globular clusters 84, planetary nebulae 61, open clusters 51): accuracy, and its mean over the classes. Networks "
    "see discs; trained, but for the frozen one, with rotations by any angle and reflections. Oblique: rotated by "
    "22.5 and 45 degrees. From scratch 60 epochs, lite0 20; settings were not tuned. "
    "With 122 to 125 test images an accuracy of 85 has a standard error of 3.",
    reference=None,
    rows=ROWS,
    lines={
        "plain ResNet, rotations": ("plain ResNet", ONE),
        "the same, mean of 8 views": ("plain ResNet", ALL),
        "D4 ResNet, rotations": ("D4 ResNet", ONE),
        "C8 ResNet, rotations": ("C8 ResNet", ONE),
        "ImageNet's lite0, frozen, symmetrized": ("lite0, frozen", ALL),
        "lite0 fine-tuned, rotations": ("lite0, fine-tuned", ONE),
        "lite0 fine-tuned, symmetrized under D4": ("lite0, fine-tuned", ALL),
    },
    splits={"random": random_split},
    split_titles={"random": "Random split, overlapping photographs on one side"},
    prepare=prepared,
    augment=augmented,
    pose=posed,
    angles=(22.5, 45),
    loss=F.cross_entropy,
    scores=scores,
    figures=("accuracy", "by class"),
)
