"""Pictures: the written rule for odd ones, refusals by reason, and one decoder for stored views."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools import images
from cache_tools.errors import CorruptionError, UsageError
from cache_tools.images import PictureRefused, check_encoding, decode_rgb, decode_view_into, encode_view, resize_rgb
from cache_tools.records import sha256_hex


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_color_modes() -> None:
    gray16 = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert decode_rgb(encoded(gray16))[0, :, 0].tolist() == [0, 0x12, 0xFF]
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


def compare_with_pillow(monkeypatch: pytest.MonkeyPatch, pictures: Iterable[bytes]) -> tuple[int, int]:
    """(pictures that simplejpeg decoded, pictures refused); pixels and refusals are those of Pillow alone."""
    plain_jpeg, used, refused = images._upright_jpeg, list[bool](), 0

    def recorded(picture: Image.Image, data: bytes) -> images.RGB | None:
        found = plain_jpeg(picture, data)
        used.append(found is not None)
        return found

    def digest(data: bytes, decoder: object) -> str:
        monkeypatch.setattr(images, "_upright_jpeg", decoder)
        try:
            return sha256_hex(decode_rgb(data).tobytes())
        except PictureRefused as error:
            return str(error)

    for data in pictures:
        found = digest(data, recorded)
        assert found == digest(data, lambda *_: None)
        refused += len(found) != 64
    monkeypatch.setattr(images, "_upright_jpeg", plain_jpeg)
    return sum(used), refused


def test_simplejpeg_decodes_plain_jpegs_to_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (7, 9, 3), np.uint8).repeat(5, 0).repeat(4, 1)
    picture, exif = Image.fromarray(noise // 2 + draw.integers(0, 99, noise.shape, np.uint8)), Image.Exif()
    exif[0x0112] = 6
    plain = [encoded(picture, "JPEG", subsampling=s, progressive=p) for s in (0, 1, 2, "4:1:1") for p in (False, True)]
    plain += [encoded(picture, "JPEG", restart_marker_blocks=2), encoded(picture, "JPEG", keep_rgb=True)]
    plain.append(encoded(picture, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]))
    turned = [encoded(picture, "JPEG", exif=exif), encoded(picture, "JPEG", xmp=b'<x tiff:Orientation="3"/>')]
    others = [encoded(picture.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    assert compare_with_pillow(monkeypatch, plain) == (len(plain), 0)
    assert compare_with_pillow(monkeypatch, turned + others) == (0, 0)
    damaged = []
    for _ in range(400):
        data = bytearray(plain[draw.integers(len(plain))])
        place = int(draw.integers(2, len(data)))
        data[place] ^= 1 << draw.integers(8)
        damaged.append(bytes(data[: place if draw.random() < 0.1 else None]))
    fast, refused = compare_with_pillow(monkeypatch, damaged)
    assert fast > 50 and refused > 50 and fast + refused < 400


def test_real_pictures_have_the_pixels_of_pillow(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in sorted((shared_data / "photos").rglob("*")) if path.is_file()]
    assert compare_with_pillow(monkeypatch, (path.read_bytes() for path in files[::10])) == (len(files[::10]), 0)
    odd = (path.read_bytes() for path in (shared_data / "odd-images").rglob("*") if path.is_file())
    assert compare_with_pillow(monkeypatch, odd)[0] > 5
