"""Place pictures and objects on a square canvas: large-scale jitter, or a fit for evaluation.

Polygons are transformed first and become masks after the crop. N objects, S pixels of the canvas.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask
from PIL import Image

from cache_tools.images import RGB
from cache_tools.labels import Boxes
from cache_tools.rng import uniform
from mcm.config import Detect

Array = npt.NDArray[Any]
Pair = tuple[int, int]  # height and width
MIN_PIXELS = 1.0  # smallest side of a target on the canvas


class Placement(NamedTuple):
    """The place of a picture: resized from `source` to `size`, cropped at `corner`, then mirrored.

    The crop has the height and width of `extent` and lies at the top left of the canvas.
    """

    source: Pair
    size: Pair
    corner: Pair
    extent: Pair
    flip: bool

    def draw(self, rgb_HW3: RGB, canvas_SS3: RGB, mean: Sequence[float]) -> None:
        """Draw the picture; the padding has the `mean` color."""
        canvas_SS3[:] = np.round(255 * np.array(mean))
        picture = self._cropped(rgb_HW3, Image.Resampling.BICUBIC)
        canvas_SS3[: self.extent[0], : self.extent[1]] = picture

    def mask(self, segmentation: Any, canvas: int) -> Array:
        """Return the mask uint8 [S, S] of COCO polygons, or of an RLE, which is decoded first."""
        (height, width), mask_SS = self.extent, np.zeros((canvas, canvas), np.uint8)
        if isinstance(segmentation, dict):
            mask_HW = coco_mask.decode(coco_mask.segmToRle(segmentation, *self.source[::-1]))
            mask_SS[:height, :width] = self._cropped(mask_HW, Image.Resampling.NEAREST)
        else:
            placed = [self.points(np.reshape(p, (-1, 2))).ravel().tolist() for p in segmentation]
            mask_SS[:height, :width] = coco_mask.decode(coco_mask.segmToRle(placed, width, height))
        return mask_SS

    def points(self, xy_N2: Array) -> Array:
        """Return points (x, y) of the picture in pixels of the canvas; they may lie outside."""
        placed_N2: Array = xy_N2 * self._scale() - self.corner[::-1]
        if self.flip:
            placed_N2[:, 0] = self.extent[1] - placed_N2[:, 0]
        return placed_N2

    def boxes(self, boxes_N4: Array) -> Array:
        """Return boxes (x0, y0, x1, y1) in pixels of the canvas, clipped to the extent."""
        corners_N22 = np.sort(self.points(boxes_N4.reshape(-1, 2)).reshape(-1, 2, 2), axis=1)
        return np.asarray(corners_N22.clip(0, self.extent[::-1])).reshape(-1, 4)

    def to_source(self, boxes_N4: Array) -> Array:
        """Return boxes of a `fitted` picture in its own pixels, clipped to it."""
        corners_N22 = boxes_N4.reshape(-1, 2, 2) / self._scale()
        return np.asarray(corners_N22.clip(0, self.source[::-1])).reshape(-1, 4)

    def _scale(self) -> Array:
        return np.divide(self.size[::-1], self.source[::-1])

    def _cropped(self, picture: Array, resampling: Image.Resampling) -> Array:
        corners = self.corner, np.add(self.corner, self.extent)
        box = np.concatenate([np.divide(corner[::-1], self._scale()) for corner in corners])
        box = np.minimum(box, np.tile(self.source[::-1], 2))  # rounding may exceed the border
        crop = Image.fromarray(picture).resize(self.extent[::-1], resampling, tuple(box.tolist()))
        return np.asarray(crop)[:, :: -1 if self.flip else 1]


def fitted(source: Pair, canvas: int) -> Placement:
    """Return the placement whose longer side fills the canvas."""
    size = _resized(source, canvas)
    return Placement(source, size, (0, 0), size, False)


def jittered(source: Pair, detect: Detect, seed: int) -> Placement:
    """Return a random scale, crop and flip, a pure function of the seed."""
    (low, high), canvas = detect.scale, detect.size
    scale, down, across, flip = uniform(seed, "jitter", np.arange(4)).tolist()
    height, width = size = _resized(source, canvas * (low + scale * (high - low)))
    extent = min(height, canvas), min(width, canvas)
    corner = int(down * (height - extent[0] + 1)), int(across * (width - extent[1] + 1))
    return Placement(source, size, corner, extent, flip < detect.flip)


def _resized(source: Pair, side: float) -> Pair:
    height, width = (max(1, round(pixels * side / max(source))) for pixels in source)
    return height, width


def outline(objects: Boxes, i: int) -> Any:
    """Return the polygons or the RLE of an object; without them, the four corners of its box."""
    x0, y0, x1, y1 = objects.boxes_N4[i].tolist()
    return objects.segmentation[i] or [[x0, y0, x1, y0, x1, y1, x0, y1]]


def targets(objects: Boxes, place: Placement, canvas: int, masks: bool) -> dict[str, Array]:
    """Return boxes float32 [N, 4], labels int64 [N] from 1, and packed masks [N, S, S / 8].

    Crowds, and objects outside the crop, are no targets. With masks, a box is the bounding box of
    its mask.
    """
    single = np.flatnonzero(~objects.iscrowd_N)
    boxes_N4, masks_NSS = place.boxes(objects.boxes_N4[single]), np.zeros((0, canvas, canvas))
    if masks and len(single):
        masks_NSS = np.stack([place.mask(outline(objects, i), canvas) for i in single.tolist()])
        bounds = (Image.fromarray(mask_SS).getbbox() for mask_SS in masks_NSS)
        boxes_N4 = np.array([bound or (0, 0, 0, 0) for bound in bounds])
    inside = (boxes_N4[:, 2:] - boxes_N4[:, :2] >= MIN_PIXELS).all(1)
    labels_N, boxes_N4 = objects.labels_N[single][inside] + 1, boxes_N4[inside]
    result: dict[str, Array] = {"boxes": boxes_N4.astype(np.float32), "labels": labels_N}
    return result | ({"masks": np.packbits(masks_NSS[inside] > 0, axis=-1)} if masks else {})
