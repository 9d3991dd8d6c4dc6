"""Drawings on pictures: the classes of pixels, and boxes with their names."""

from collections.abc import Sequence
from colorsys import hsv_to_rgb

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cache_tools.images import RGB

GOLDEN = 0.618034  # of a turn: the hues of neighboring classes differ most


def color(label: int) -> tuple[int, int, int]:
    """Return the color of a class."""
    red, green, blue = hsv_to_rgb(label * GOLDEN % 1, 0.7, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_labels(rgb_HW3: RGB, labels_HW: npt.NDArray[np.integer], num_classes: int) -> RGB:
    """Return the picture blended with the colors of its classes; other pixels do not change."""
    colors = np.array([color(label) for label in range(num_classes)], np.uint8)
    labeled_HW1 = (labels_HW < num_classes)[..., None]
    blended_HW3 = rgb_HW3 // 2 + colors[labels_HW.clip(max=num_classes - 1)] // 2
    return np.where(labeled_HW1, blended_HW3, rgb_HW3)


def draw_boxes(
    rgb_HW3: RGB, boxes_N4: npt.ArrayLike, labels_N: Sequence[int], names_N: Sequence[str]
) -> RGB:
    """Return the picture with boxes (x0, y0, x1, y1) in the colors of their classes, and names."""
    picture = Image.fromarray(rgb_HW3)
    draw, side = ImageDraw.Draw(picture), min(picture.size)
    font, line_width = ImageFont.load_default(max(10, side // 32)), max(1, side // 240)
    for box, label, name in zip(np.asarray(boxes_N4).tolist(), labels_N, names_N, strict=True):
        draw.rectangle(box, outline=color(label), width=line_width)
        _, _, width, height = draw.textbbox((0, 0), name, font=font)
        # Above the box and inside the picture, if the name fits there.
        x, y = max(0, min(box[0], picture.width - width)), max(0, box[1] - height)
        draw.rectangle((x, y, x + width, y + height), fill=color(label))
        draw.text((x, y), name, fill="black", font=font)
    return np.asarray(picture)
