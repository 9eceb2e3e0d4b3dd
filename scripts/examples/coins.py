"""scikit-image's photograph of coins as data for the examples: crops, masks and boxes."""

import numpy as np
import skimage
import torch

__all__ = ["coins"]


def coins(
    rows: slice = slice(0, 288), columns: slice = slice(0, 384)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A crop [3, H, W] in 0 ... 1, a mask of its coins [H, W], and their boxes [N, 4] (x1, y1, x2, y2).

    Args:
        rows: of 303 pixels.
        columns: of 384 pixels.
    """
    image = skimage.data.coins()[rows, columns].copy()
    smooth = skimage.filters.gaussian(image, 2)
    mask = smooth > skimage.filters.threshold_local(smooth, 151)
    mask = skimage.morphology.opening(mask, skimage.morphology.disk(7))
    regions = skimage.measure.regionprops(skimage.measure.label(mask))
    boxes = [[x1, y1, x2, y2] for y1, x1, y2, x2 in (region.bbox for region in regions)]
    pixels = torch.from_numpy(image.astype(np.float32) / 255).expand(3, -1, -1)
    return pixels, torch.from_numpy(mask), torch.tensor(boxes, dtype=torch.float32)
