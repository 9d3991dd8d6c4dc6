"""Masks: what each kind of PNG means, what is refused and with which line, and that labels come back exactly."""

import io

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import CorruptionError, UsageError
from cache_tools.images import PictureRefused
from cache_tools.labels import MaskRule, decode_mask, stored_mask

VALUES = np.array([[0, 1, 2], [3, 2, 0]], np.uint8)
ADE = MaskRule(3, (0,))


def png(array, mode=None, **options) -> bytes:
    picture = Image.fromarray(array)
    if mode == "P":
        picture.putpalette([7 * k % 256 for k in range(768)])
    elif mode:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def stored(data, rule, size=(2, 3), classes=4):
    return decode_mask(stored_mask(data, size, rule), classes, "here").tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (ADE, [[255, 0, 1], [2, 1, 255]]),
        (MaskRule(4, (255,)), VALUES.tolist()),
        (MaskRule(2, (1, 3)), [[0, 255, 1], [255, 1, 0]]),
        (MaskRule(4, ()), VALUES.tolist()),
    ],
)
def test_classes_are_the_values_that_are_not_ignored_in_order(rule, expected):
    assert stored(png(VALUES), rule) == expected
    assert stored(png(VALUES, "P"), rule) == expected
    assert stored(png(VALUES, "P", bits=2), rule) == expected
    assert stored(png(VALUES.astype(np.uint16)), rule) == expected


def test_one_bit_is_zero_and_one_and_masks_come_back_exactly():
    bits = VALUES % 2
    assert stored(png(bits * 255, "1"), MaskRule(2, ())) == bits.tolist()
    labels = np.random.default_rng(0).integers(0, 256, (31, 17)).astype(np.uint8)
    assert stored(png(labels), MaskRule(255, (255,)), (31, 17), 255) == labels.tolist()


def four_bits() -> bytes:
    """A gray PNG of 4 bits per pixel, whose values Pillow multiplies by 17."""
    data = bytearray(png(VALUES, "P", bits=4))
    data[25] = 0
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (png(np.full((2, 3), 4, np.uint8)), "mask-value", "up to 3, or the values .0. of --ignore; found 4 at row 0"),
        (png(np.array([[0, 1, 2], [3, 2, 255]], np.uint8)), "mask-value", "found 255 at row 1, column 2"),
        (png(np.full((2, 3), 257, np.uint16)), "mask-value", "found 257"),
        (
            png(np.zeros((2, 3, 3), np.uint8)),
            "mask-mode",
            "gray of 1, 8 or 16 bits, or with a palette; found color type 2 of 8",
        ),
        (png(np.zeros((2, 3, 4), np.uint8)), "mask-mode", "found color type 6"),
        (four_bits(), "mask-mode", "found color type 0 of 4 bits"),
        (b"\xff\xd8\xff\xe0 a JPEG", "mask-mode", "expected a PNG"),
        (b"", "mask-mode", "expected a PNG"),
        (png(VALUES.T), "mask-size", "expected 3x2 pixels, the size of the upright picture; found 2x3"),
        (png(VALUES)[:45], "mask-damaged", "."),
        (png(VALUES)[:30], "mask-damaged", "cannot identify image file$"),  # no address: the same bytes each time
    ],
)
def test_what_is_refused_and_why(data, reason, detail):
    with pytest.raises(PictureRefused, match=detail) as refused:
        stored_mask(data, (2, 3), ADE)
    assert refused.value.reason == reason


@pytest.mark.parametrize("rule", [MaskRule(1, ()), MaskRule(256, ()), MaskRule(255, (0, 255)), MaskRule(0, (0,))])
def test_numbers_of_classes_that_eight_bits_do_not_hold(rule):
    with pytest.raises(UsageError, match="expected masks of 2 to 25[45] classes"):
        rule.values()
    assert len(MaskRule(254, (0, 255)).values()) == 254


@pytest.mark.parametrize("data", [b"", png(VALUES)[:45], png(np.zeros((2, 3, 3), np.uint8)), png(VALUES + 1)], ids=len)
def test_a_stored_mask_that_is_none_or_holds_another_label_is_corruption(data):
    with pytest.raises(CorruptionError, match="here: expected a mask of 4 classes; found"):
        decode_mask(data, 4, "here")
