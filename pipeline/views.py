"""Exact views: which crop a row shows in a view, and its rendering. What is stored is what teacher and student see."""

from typing import NamedTuple

import numpy as np

from cache_tools.images import RGB, decode_rgb, decode_view_into, encode_view, resize_rgb
from cache_tools.records import sha256_hex
from cache_tools.rng import uniform
from cache_tools.schema import CropPolicy

TRAIN = "train"  # the split that is drawn by the crop policy; every other one is centre crops


class Geometry(NamedTuple):
    """A crop in pixels of the upright source; `flip` 1 mirrors it left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: int
    source_height: int
    source_width: int


def draw_crop(policy: CropPolicy, seed: int, split: str, row: int, view: int, height: int, width: int) -> Geometry:
    """The crop of a row in a view: a random resized crop as in torchvision, every number a counter hash."""
    if policy.kind == "center" or split != TRAIN:
        side = min(height, width)
        return Geometry((height - side) // 2, (width - side) // 2, side, side, 0, height, width)
    u = uniform(seed, f"crop/{split}", row, view, np.arange(1 + 10 * 4))
    flip = int(u[0] < policy.flip)
    for area, ratio, y, x in u[1:].reshape(10, 4):
        crop_area = height * width * (policy.scale[0] + area * (policy.scale[1] - policy.scale[0]))
        aspect = float(np.exp(np.log(policy.ratio[0]) + ratio * np.log(policy.ratio[1] / policy.ratio[0])))
        crop_width, crop_height = round((crop_area * aspect) ** 0.5), round((crop_area / aspect) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1))
            return Geometry(top, left, crop_height, crop_width, flip, height, width)
    # No crop of that area and shape fits a very long picture: the largest centred one of an allowed shape.
    crop_width = min(width, max(1, int(height * policy.ratio[1])))
    crop_height = min(height, max(1, int(width / policy.ratio[0])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Geometry(top, left, crop_height, crop_width, flip, height, width)


def render(rgb_HW3: RGB, geometry: Geometry, height: int, width: int) -> RGB:
    """Crop, antialiased bicubic resize to height x width, mirror: uint8 [height, width, 3]."""
    rows = slice(geometry.top, geometry.top + geometry.height)
    columns = slice(geometry.left, geometry.left + geometry.width)
    view = resize_rgb(rgb_HW3[rows, columns], height, width)
    return np.ascontiguousarray(view[:, ::-1]) if geometry.flip else np.ascontiguousarray(view)


def pixels_sha256(encoding: str) -> str:
    """Digest of a fixed picture on its way from a JPEG to a teacher's input, by the libraries of this machine.

    It differs where a decoder, encoder or resize of another version (or processor) would change a pixel.
    """
    noise = uniform(0, "pixels", np.arange(64 * 96 * 3)).reshape(64, 96, 3)
    source = encode_view(resize_rgb((noise * 255).astype(np.uint8), 160, 240), "jpeg:90:420")
    crop = Geometry(11, 23, 120, 150, 1, 160, 240)
    view = np.empty((64, 64, 3), np.uint8)
    decode_view_into(encode_view(render(decode_rgb(source), crop, 64, 64), encoding), view)
    return sha256_hex(view.tobytes() + resize_rgb(view, 56, 56).tobytes())
