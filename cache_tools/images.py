"""Decode pictures to RGB and encode views, by one versioned rule.

The rule, of version PICTURE_RULES:

- The content decides the format, which is JPEG, PNG or WebP; the name does not.
- A picture has at most MAX_PIXELS. Of several frames, the first is decoded.
- The EXIF orientation is applied. An ICC profile is ignored, as in timm and torchvision.
- 16-bit gray keeps the high byte of each value. Its transparent color is ignored.
- Any other picture with transparency is composited over white.
- Pillow converts all other modes to RGB, including CMYK and palettes.
- A truncated picture is refused.
"""

import io
import re
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from .errors import CorruptionError, UsageError
from .records import sha256_hex
from .rng import uniform

PICTURE_RULES = 1
MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
# Extensions of candidates. gif, bmp and tiff files are refused and recorded, not left out silently.
PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
RGB = npt.NDArray[np.uint8]


class PictureRefused(Exception):
    """A picture is refused and gets no row: `reason` is a short code, `detail` explains it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # pickle needs both arguments
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def picture_extension(data: bytes) -> str:
    """Return `jpg`, `png` or `webp` by the first bytes of a picture.

    Raises: PictureRefused for another format.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    reason = "format" if data else "empty"
    raise PictureRefused(reason, f"expected JPEG, PNG or WebP; it begins {data[:12]!r}")


def decode_rgb(data: bytes) -> RGB:
    """Decode a picture to uint8 [H, W, 3], by the rule in the docstring of this module.

    Raises: PictureRefused with the reason empty, format, too-large or damaged.
    """
    picture_extension(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                detail = f"{picture.width}x{picture.height} is over {MAX_PIXELS} pixels"
                raise PictureRefused("too-large", detail)
            if (rgb_HW3 := _upright_jpeg(picture, data)) is not None:
                return rgb_HW3
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except Image.DecompressionBombError as error:
        raise PictureRefused("too-large", str(error)) from error
    except (PictureRefused, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        raise PictureRefused("damaged", error_detail(error)) from error


def error_detail(error: Exception) -> str:
    """Return the message of Pillow without the address of a buffer, which differs in each run."""
    return re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", str(error))


def _upright_jpeg(picture: Image.Image, data: bytes) -> RGB | None:
    """Return the pixels of an upright RGB JPEG, or None if Pillow has to decode or refuse it.

    simplejpeg takes two thirds of Pillow's time and returns the same pixels, because both use
    libjpeg-turbo. It raises ValueError for any damage; Pillow accepts some damage.
    """
    if picture.format not in ("JPEG", "MPO") or picture.mode != "RGB":
        return None
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    with suppress(ValueError):
        rgb_HW3: RGB = simplejpeg.decode_jpeg(data)
        return rgb_HW3 if rgb_HW3.shape[1::-1] == picture.size else None
    return None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray; convert("RGB") would clip it to white
        high_HW = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255)
        picture = Image.fromarray(high_HW.astype(np.uint8))
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def resize_rgb(rgb_HW3: RGB, height: int, width: int) -> RGB:
    """Resize by Pillow (bicubic, antialiased); return the input array if the size matches."""
    if rgb_HW3.shape[:2] == (height, width):
        return rgb_HW3
    return np.asarray(Image.fromarray(rgb_HW3).resize((width, height), Image.Resampling.BICUBIC))


def check_encoding(encoding: str) -> tuple[int, str] | None:
    """Return (quality, subsampling) of "jpeg:QUALITY:444|422|420", or None for "png".

    Raises: UsageError for another encoding.
    """
    if encoding == "png":
        return None
    match = re.fullmatch("jpeg:0{0,2}([1-9][0-9]?|100):(444|422|420)", encoding)
    if not match:
        expected = "expected png or jpeg:QUALITY:444|422|420"
        raise UsageError(f"view encoding: {expected}; found {encoding!r}")
    return int(match[1]), match[2]


def encode_view(rgb_HW3: RGB, encoding: str) -> bytes:
    """Encode a rendered view as JPEG or PNG bytes."""
    jpeg = check_encoding(encoding)
    if jpeg is None:
        buffer = io.BytesIO()
        Image.fromarray(rgb_HW3).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()
    quality, subsampling = jpeg
    contiguous = np.ascontiguousarray(rgb_HW3)
    return bytes(simplejpeg.encode_jpeg(contiguous, quality, "RGB", colorsubsampling=subsampling))


def decode_view_into(data: bytes | memoryview, out_HW3: RGB) -> None:
    """Decode a stored view into `out_HW3`, uint8 [H, W, 3].

    The input of the teacher and the input of the student both use this decoder.
    Raises: CorruptionError if the bytes are not a picture of this size.
    """
    height, width = out_HW3.shape[:2]
    try:
        if data[:3] == b"\xff\xd8\xff":
            found = simplejpeg.decode_jpeg_header(data)[:2]
            if found == (height, width):
                simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out_HW3)
        else:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
                found = picture.size[::-1]
                if found == (height, width):
                    out_HW3[:] = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        message = f"expected a view of {height}x{width} pixels; it cannot be decoded: {error}"
        raise CorruptionError(message) from error
    if found != (height, width):
        message = f"expected a view of {height}x{width} pixels; found {found[0]}x{found[1]}"
        raise CorruptionError(message)


def pixels_sha256(encoding: str) -> str:
    """Return the digest of a fixed view and teacher input, which are computed from a JPEG.

    It changes if another version of the decoder, encoder or resize, or another processor, changes a
    pixel.
    """
    noise = uniform(0, "pixels", np.arange(64 * 96 * 3)).reshape(64, 96, 3)
    source = encode_view(resize_rgb((noise * 255).astype(np.uint8), 160, 240), "jpeg:90:420")
    crop = resize_rgb(decode_rgb(source)[11:131, 23:173], 64, 64)[:, ::-1]
    view = np.empty((64, 64, 3), np.uint8)
    decode_view_into(encode_view(crop, encoding), view)
    return sha256_hex(view.tobytes() + resize_rgb(view, 56, 56).tobytes())
