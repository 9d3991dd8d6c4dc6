"""Masks and boxes: convert the values of a source mask to labels, and decode what is stored.

A stored mask is an 8-bit gray PNG with labels 0 to K - 1 and IGNORED for unlabeled pixels. In a
source mask, the classes are the values from 0 upwards, in order, without the ignored values. A gray
PNG has values of 1, 8 or 16 bits. The values of a palette PNG are its palette indices.

Stored boxes are one JSON with `image_id`, `width`, `height` and the COCO records `annotations`.
"""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import CorruptionError, UsageError
from .images import PictureRefused, error_detail

IGNORED = 255
Mask = npt.NDArray[np.uint8]
_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_GRAY, _PALETTE = 0, 3  # color types of PNG
# Supported bit depths. Gray of 2 and 4 bits is missing, because Pillow scales its values to 255.
_DEPTHS = {_GRAY: (1, 8, 16), _PALETTE: (1, 2, 4, 8)}


class MaskRule(NamedTuple):
    """The number of classes in the masks of a source, and the values that mean unlabeled."""

    classes: int
    ignore: tuple[int, ...]

    def values(self) -> list[int]:
        """Return the value of each class in the source masks.

        Raises: UsageError if 8 bits cannot hold the classes.
        """
        values = [value for value in range(256) if value not in self.ignore][:IGNORED]
        if not 2 <= self.classes <= len(values):
            raise UsageError(f"expected masks of 2 to {len(values)} classes; found {self.classes}")
        return values[: self.classes]


def stored_mask(data: bytes, size_HW: tuple[int, int], rule: MaskRule) -> bytes:
    """Convert a PNG mask of a source to the mask that is stored, and return its bytes.

    `size_HW` is the size of the upright picture.

    Raises: PictureRefused with the reason mask-mode, mask-size, mask-damaged or mask-value.
    """
    header = data[:26].ljust(26, b"\0")
    found_HW = int.from_bytes(header[20:24]), int.from_bytes(header[16:20])
    is_png, depth, color = header[:16] == _HEADER, header[24], header[25]
    if not is_png or depth not in _DEPTHS.get(color, ()):
        found = f"color type {color} of {depth} bits" if is_png else f"a file with {data[:12]!r}"
        expected = "expected a PNG in gray of 1, 8 or 16 bits, or with a palette"
        raise PictureRefused("mask-mode", f"{expected}; found {found}")
    if found_HW != size_HW:
        expected = f"expected {size_HW[1]}x{size_HW[0]} pixels, the size of the upright picture"
        raise PictureRefused("mask-size", f"{expected}; found {found_HW[1]}x{found_HW[0]}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            values_HW = np.asarray(picture).astype(np.uint16)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise PictureRefused("mask-damaged", error_detail(error)) from error
    table = np.full(1 << 16, -1, np.int16)
    table[rule.values()], table[list(rule.ignore)] = np.arange(rule.classes), IGNORED
    labels_HW = table[values_HW]
    if (labels_HW < 0).any():
        row, column = np.argwhere(labels_HW < 0)[0].tolist()
        expected = f"expected values of {rule.classes} classes, up to {rule.values()[-1]}"
        ignored = f"or the values {list(rule.ignore)} of --ignore"
        found = f"found {values_HW[row, column]} at row {row}, column {column}"
        raise PictureRefused("mask-value", f"{expected}, {ignored}; {found}")
    return encode_mask(labels_HW.astype(np.uint8))


def encode_mask(labels_HW: Mask) -> bytes:
    """Return labels as an 8-bit gray PNG."""
    buffer = io.BytesIO()
    Image.fromarray(labels_HW).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_mask(data: bytes, num_classes: int, where: str) -> Mask:
    """Return the labels [H, W] of a stored mask.

    Raises: CorruptionError with `where` if the bytes are not a mask or contain another label.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            labels = np.asarray(picture)
        if labels.ndim == 2 and ((labels < num_classes) | (labels == IGNORED)).all():
            return labels
        found = f"shape {labels.shape}, values up to {labels.max()}"
    except (OSError, ValueError, SyntaxError) as error:
        found = repr(error)
    raise CorruptionError(f"{where}: expected a mask of {num_classes} classes; found {found}")


class Boxes(NamedTuple):
    """The N objects of a picture, in pixels of the upright picture; x points right and y down.

    `boxes_N4` is x0, y0, x1, y1. A label is a position in the classes. `segmentation` holds, per
    object, COCO's list of polygons [x, y, x, y, ...], its RLE, or an empty list.
    """

    image_id: int
    size_HW: tuple[int, int]
    labels_N: npt.NDArray[np.int64]
    boxes_N4: npt.NDArray[np.float64]
    area_N: npt.NDArray[np.float64]
    iscrowd_N: npt.NDArray[np.bool_]
    segmentation: list[Any]


def decode_boxes(data: bytes, category_ids: Sequence[int], where: str) -> Boxes:
    """Return the objects in the stored JSON of a picture.

    Without an area, an object has the area of its box.

    Raises: CorruptionError with `where` if the bytes are other JSON or have another category.
    """
    try:
        picture = json.loads(data)
        objects = picture["annotations"]
        xywh_N4 = np.array([each["bbox"] for each in objects], np.float64).reshape(len(objects), 4)
        areas = [each.get("area", each["bbox"][2] * each["bbox"][3]) for each in objects]
        labels = [category_ids.index(each["category_id"]) for each in objects]
        size_HW = (picture["height"], picture["width"])
        ends_N2 = (xywh_N4[:, :2] + xywh_N4[:, 2:]).clip(max=size_HW[::-1])  # the sum is rounded
        return Boxes(
            image_id=picture["image_id"],
            size_HW=size_HW,
            labels_N=np.array(labels, np.int64),
            boxes_N4=np.concatenate([xywh_N4[:, :2], ends_N2], 1),
            area_N=np.array(areas, np.float64),
            iscrowd_N=np.array([each.get("iscrowd", 0) for each in objects], np.bool_),
            segmentation=[each.get("segmentation") or [] for each in objects],
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        expected = "expected the COCO annotations of a picture"
        raise CorruptionError(f"{where}: {expected}; found {error!r}") from error
