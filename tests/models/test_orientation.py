"""Orientation networks: scores permute when the image rotates; the folder of rotated images labels what they learn."""

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset
from torchvision.transforms.functional import pil_to_tensor

from equivision_timm.models.orientation import standardize


@pytest.mark.parametrize(
    ("name", "steps"),
    [("c4orient_tiny", 1), ("c8orient_tiny", 2), ("c4orient_lite0", 1), ("c8orient_lite0", 2)],
)
@pytest.mark.parametrize("size", [65, 97])
@torch.no_grad()
def test_scores_permute(name, steps, size):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.nn.functional.interpolate(torch.randn(4, 3, 16, 16), (size, size), mode="bicubic")
    scores = model(x)
    assert scores.shape == (4, model.num_classes)
    for k in range(4):
        turned = model(torch.rot90(x, k, (-2, -1)))
        assert torch.allclose(turned, scores.roll(k * steps, 1), atol=1e-4 * scores.abs().max())
    mean, std = torch.randn(3, 1, 1), torch.rand(3, 1, 1) + 0.5  # of the normalisation
    assert torch.allclose(model(mean + std * x), scores, atol=1e-3 * scores.abs().max())
    assert (model(torch.rot90(x, 1, (-2, -1))) - scores).abs().max() > 1e-2 * scores.abs().max()  # the control


def test_standardize():
    x = standardize(5 + 3 * torch.randn(2, 3, 65, 65))
    assert x[..., 0, 0].abs().max() == 0  # the corners
    inside = x[x != 0].view(2, 3, -1)
    assert torch.allclose(inside.mean(2), torch.zeros(2, 3), atol=1e-2)
    assert torch.allclose(inside.std(2), torch.ones(2, 3), atol=1e-2)


@pytest.mark.parametrize(("name", "rotations", "spread"), [("c4", 4, 45), ("c8", 8, 22.5), ("c8_15", 8, 15)])
def test_the_class_is_the_nearest_rotation(tmp_path, name, rotations, spread):
    """A bright dot at the right end of a dark picture shows the angle."""
    (tmp_path / "val" / "any").mkdir(parents=True)
    picture = Image.new("L", (65, 65))
    picture.paste(255, (58, 31, 61, 34))
    for i in range(24):
        picture.save(tmp_path / "val" / "any" / f"{i}.png")
    data = create_dataset(f"torch/oriented_folder_{name}", str(tmp_path), split="val", input_img_mode="L")
    assert len(data) == 24
    for index in range(24):
        image, target = data[index]
        pixels = pil_to_tensor(image)[0]
        y, x = divmod(int(pixels.argmax()), 65)
        angle = float(torch.rad2deg(torch.atan2(torch.tensor(32.0 - y), torch.tensor(x - 32.0))))
        distance = (angle - 360 / rotations * target + 180) % 360 - 180
        assert abs(distance) <= spread + 3
    assert [data[i][1] for i in range(24)] == [data[i][1] for i in range(24)]
    assert len({data[i][1] for i in range(24)}) == rotations
