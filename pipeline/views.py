"""Exact views: draw the crop of a row in a view, and render it.

The teacher and the student both see the stored view.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from cache_tools.images import RGB, resize_rgb
from cache_tools.rng import uniform
from cache_tools.schema import CropPolicy

TRAIN = "train"  # the crop policy applies to this split; other splits get center crops


class Geometry(NamedTuple):
    """A crop in pixels of the upright source; a `flip` of 1 mirrors it left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: int
    source_height: int
    source_width: int


def draw_crop(
    policy: CropPolicy, seed: int, split: str, row: int, view: int, height: int, width: int
) -> Geometry:
    """Return the crop of a row in a view: a center crop, or a random resized crop.

    The random crop follows torchvision, but every number comes from a counter-based hash.
    """
    if policy.kind == "center" or split != TRAIN:
        side = min(height, width)
        return Geometry((height - side) // 2, (width - side) // 2, side, side, 0, height, width)
    u = uniform(seed, f"crop/{split}", row, view, np.arange(1 + 10 * 4))
    flip = int(u[0] < policy.flip)
    (low, high), (narrow, wide) = policy.scale, policy.ratio
    for area, ratio, y, x in u[1:].reshape(10, 4):
        crop_area = height * width * (low + area * (high - low))
        aspect = float(np.exp(np.log(narrow) + ratio * np.log(wide / narrow)))
        crop_width = round((crop_area * aspect) ** 0.5)
        crop_height = round((crop_area / aspect) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1))
            return Geometry(top, left, crop_height, crop_width, flip, height, width)
    # No such crop fits a very long picture; use the largest center crop of an allowed aspect ratio.
    crop_width = min(width, max(1, int(height * wide)))
    crop_height = min(height, max(1, int(width / narrow)))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Geometry(top, left, crop_height, crop_width, flip, height, width)


def render(rgb_HW3: RGB, geometry: Geometry, height: int, width: int) -> RGB:
    """Return the crop uint8 [height, width, 3], resized (antialiased bicubic) and flipped."""
    rows = slice(geometry.top, geometry.top + geometry.height)
    columns = slice(geometry.left, geometry.left + geometry.width)
    view = resize_rgb(rgb_HW3[rows, columns], height, width)
    if geometry.flip:  # Pillow mirrors faster than numpy
        view = np.asarray(Image.fromarray(view).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return np.ascontiguousarray(view)
