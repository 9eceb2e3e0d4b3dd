"""The photograph of coins that scikit-image ships, as data for the examples: crops, masks and boxes."""

import numpy as np
import skimage
import torch

__all__ = ["coins"]


def coins() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The image [3, 288, 384] in 0 ... 1, a mask of the coins [288, 384], and their boxes [N, 4] (x1, y1, x2, y2)."""
    image = skimage.data.coins()[:288].copy()
    smooth = skimage.filters.gaussian(image, 2)
    mask = smooth > skimage.filters.threshold_local(smooth, 151)
    mask = skimage.morphology.opening(mask, skimage.morphology.disk(7))
    regions = skimage.measure.regionprops(skimage.measure.label(mask))
    boxes = [[x1, y1, x2, y2] for y1, x1, y2, x2 in (region.bbox for region in regions)]
    pixels = torch.from_numpy(image.astype(np.float32) / 255).expand(3, -1, -1)
    return pixels, torch.from_numpy(mask), torch.tensor(boxes, dtype=torch.float32)
