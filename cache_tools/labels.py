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
Mask = npt.NDArray[np.uint8]
_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_GREY, _PALETTE = 0, 3  # colour types of PNG
_DEPTHS = {_GREY: (1, 8, 16), _PALETTE: (1, 2, 4, 8)}  # Pillow would scale grey of 2 and 4 bits to 255


class MaskRule(NamedTuple):
    """How the masks of a source are read: the number of classes, and the values that mean unlabelled."""

    classes: int
    ignore: tuple[int, ...]

    def values(self) -> list[int]:
        """Return the source's value of each class.

        Raises: UsageError where 8 bits do not hold them.
        """
        values = [value for value in range(256) if value not in self.ignore][:IGNORED]
        if not 2 <= self.classes <= len(values):
            raise UsageError(f"expected 2 to {len(values)} classes of masks; found {self.classes}")
        return values[: self.classes]


def has_palette(header: bytes) -> bool:
    """Return whether the first 26 bytes are those of a palette PNG."""
    return header[:16] == _HEADER and header[25:26] == bytes([_PALETTE])


def stored_mask(data: bytes, size_HW: tuple[int, int], rule: MaskRule) -> bytes:
    """Return the mask to store of a source's PNG.

    Raises: PictureRefused with the reason mask-mode, mask-size, mask-damaged or mask-value.
    """
    header = data[:26].ljust(26, b"\0")
    found_HW, depth, colour = (int.from_bytes(header[20:24]), int.from_bytes(header[16:20])), header[24], header[25]
    if header[:16] != _HEADER or depth not in _DEPTHS.get(colour, ()):
        found = f"found colour type {colour} of {depth} bits" if header[:16] == _HEADER else f"it begins {data[:12]!r}"
        raise PictureRefused("mask-mode", f"expected a PNG, grey of 1, 8 or 16 bits or with a palette; {found}")
    if found_HW != size_HW:
        found, expected = (f"{width}x{height}" for height, width in (found_HW, size_HW))
        raise PictureRefused("mask-size", f"expected {expected} pixels, as the upright picture; found {found}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            values_HW = np.asarray(picture).astype(np.uint16)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        raise PictureRefused("mask-damaged", str(error)) from error
    table = np.full(1 << 16, -1, np.int16)
    table[rule.values()], table[list(rule.ignore)] = np.arange(rule.classes), IGNORED
    labels_HW = table[values_HW]
    if (labels_HW < 0).any():
        row, column = np.argwhere(labels_HW < 0)[0].tolist()
        known = f"expected the values of {rule.classes} classes, up to {rule.values()[-1]}, or {list(rule.ignore)}"
        found = f"found {values_HW[row, column]} at row {row}, column {column}"
        raise PictureRefused("mask-value", f"{known}, which --ignore sets; {found}")
    buffer = io.BytesIO()
    Image.fromarray(labels_HW.astype(np.uint8)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_mask(data: bytes, num_classes: int, where: str) -> Mask:
    """Return the labels [H, W] of a stored mask.

    Raises: CorruptionError naming `where`, when the bytes are none or hold another label.
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
