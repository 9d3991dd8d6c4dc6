"""Masks: a PNG's values to labels and back by one written rule.

A stored mask is an 8-bit grey PNG of labels 0 to K - 1, and IGNORED for pixels of no class. In a source the classes are
the values from 0 up in order, without the ignored ones. Grey PNGs hold values of 1, 8 or 16 bits, palette PNGs indices.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import CorruptionError, UsageError
from .images import PictureRefused

IGNORED = 255
MAX_CLASSES = 255
Mask = npt.NDArray[np.uint8]
_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_GREY, _PALETTE = 0, 3  # colour types of PNG
_MODES = ("1", "L", "P", "I;16")


class MaskRule(NamedTuple):
    """How the masks of a source are read: the number of classes, and the values that count as unlabelled."""

    classes: int
    ignore: tuple[int, ...]

    def values(self) -> list[int]:
        """Return the source's value of each class.

        Raises: UsageError where 8 bits do not hold them.
        """
        values = [value for value in range(256) if value not in self.ignore]
        if not 2 <= self.classes <= min(MAX_CLASSES, len(values)):
            raise UsageError(f"expected 2 to {min(MAX_CLASSES, len(values))} classes of masks; found {self.classes}")
        return values[: self.classes]


def has_palette(header: bytes) -> bool:
    """Return whether the first 26 bytes are those of a palette PNG."""
    return header[:16] == _HEADER and header[25:26] == bytes([_PALETTE])


def stored_mask(data: bytes, size_HW: tuple[int, int], rule: MaskRule) -> bytes:
    """Return the mask to store of a source's PNG.

    Raises: PictureRefused with the reason mask-mode, mask-size, mask-damaged or mask-value.
    """
    values_HW = _values(data, size_HW)
    table = np.full(1 << 16, -1, np.int16)
    table[rule.values()] = np.arange(rule.classes)
    table[list(rule.ignore)] = IGNORED
    labels_HW = table[values_HW]
    if (labels_HW < 0).any():
        row, column = np.argwhere(labels_HW < 0)[0].tolist()
        found = f"found {values_HW[row, column]} at row {row}, column {column}"
        known = f"expected the values of {rule.classes} classes, up to {rule.values()[-1]}, or {list(rule.ignore)}"
        raise PictureRefused("mask-value", f"{known}, which --ignore sets; {found}")
    return encode_mask(labels_HW.astype(np.uint8))


def _values(data: bytes, size_HW: tuple[int, int]) -> npt.NDArray[np.integer]:
    if data[:16] != _HEADER:
        raise PictureRefused("mask-mode", f"expected a PNG; it begins {data[:12]!r}")
    depth, colour = data[24], data[25]
    if (colour, depth) in ((_GREY, 2), (_GREY, 4)):  # Pillow would scale 3 or 15 to 255
        raise PictureRefused("mask-mode", f"expected grey of 1, 8 or 16 bits, or a palette; found grey of {depth} bits")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode not in _MODES:
                raise PictureRefused("mask-mode", f"expected a grey or palette PNG; found mode {picture.mode}")
            if picture.size[::-1] != size_HW:
                found, expected = ("x".join(map(str, size)) for size in (picture.size, size_HW[::-1]))
                raise PictureRefused("mask-size", f"expected {expected} pixels, as the upright picture; found {found}")
            return np.asarray(picture).astype(np.int64)
    except (PictureRefused, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        raise PictureRefused("mask-damaged", str(error)) from error


def encode_mask(labels_HW: Mask) -> bytes:
    """Return the PNG of labels."""
    buffer = io.BytesIO()
    Image.fromarray(labels_HW).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_mask(data: bytes) -> Mask:
    """Return the labels [H, W] of a stored mask.

    Raises: CorruptionError when the bytes are none.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if picture.mode == "L":
                return np.asarray(picture)
            found = f"mode {picture.mode}"
    except (OSError, ValueError, SyntaxError) as error:
        found = repr(error)
    raise CorruptionError(f"expected a mask that was good when it was sharded; found {found}")
