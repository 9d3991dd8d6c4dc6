"""Pictures: the written rule for odd ones, refusals by reason, and one decoder for stored views."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import CorruptionError, UsageError
from cache_tools.images import PictureRefused, check_encoding, decode_rgb, decode_view_into, encode_view, resize_rgb


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_colour_modes() -> None:
    grey16 = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert decode_rgb(encoded(grey16))[0, :, 0].tolist() == [0, 0x12, 0xFF]
    clear = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8), "RGBA")
    assert decode_rgb(encoded(clear)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert decode_rgb(encoded(Image.new("1", (2, 1), 1))).tolist() == [[[255] * 3] * 2]
    assert decode_rgb(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "JPEG")).max() < 8


def test_exif_orientation_is_applied() -> None:
    upright = np.zeros((4, 8, 3), np.uint8)
    upright[:, :4, 0] = 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(Image.fromarray(upright).rotate(90, expand=True), "JPEG", exif=exif, quality=100, subsampling=0)
    assert np.abs(decode_rgb(turned).astype(int) - upright).max() < 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a" + bytes(40), "format"),
        (b"hello, I am text", "format"),
        (b"\xff\xd8\xff\xe0 no more", "damaged"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-300], "damaged"),
        (encoded(Image.new("L", (9000, 9000))), "too-large"),
    ],
)
def test_refusals(data: bytes, reason: str) -> None:
    with pytest.raises(PictureRefused) as caught:
        decode_rgb(data)
    assert caught.value.reason == reason


def test_views_round_trip_and_size_is_checked() -> None:
    draw = np.random.default_rng(0)
    picture = resize_rgb(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8), 32, 32)
    out = np.empty((32, 32, 3), np.uint8)
    decode_view_into(encode_view(picture, "png"), out)
    assert (out == picture).all()
    decode_view_into(encode_view(picture, "jpeg:95:444"), out)
    assert np.abs(out.astype(int) - picture).mean() < 3
    for encoding in ("png", "jpeg:92:420"):
        with pytest.raises(CorruptionError, match="expected a view of 16x16"):
            decode_view_into(encode_view(picture, encoding), np.empty((16, 16, 3), np.uint8))
        with pytest.raises(CorruptionError):
            decode_view_into(encode_view(picture, encoding)[:40], out)


@pytest.mark.parametrize("encoding", ["jpeg", "jpeg:0:444", "jpeg:101:444", "jpeg:90:411", "webp", "jpeg:x:420"])
def test_unknown_encodings(encoding: str) -> None:
    with pytest.raises(UsageError, match="jpeg:QUALITY"):
        check_encoding(encoding)


def test_orientations_of_real_files_agree(shared_data: Path) -> None:
    files = [shared_data / "odd-images" / "exif" / f"Landscape_{i}.jpg" for i in range(1, 9)]
    shown = [resize_rgb(decode_rgb(file.read_bytes()), 40, 60).astype(int) for file in files]
    assert max(np.abs(picture - shown[0]).mean() for picture in shown) < 6
