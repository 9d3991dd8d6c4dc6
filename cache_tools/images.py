"""Pictures: bytes to RGB and back by one written rule.

The rule, version PICTURE_RULES: JPEG, PNG or WebP by content, never by name; the first frame; at most MAX_PIXELS; EXIF
orientation applied; ICC profiles ignored (as timm and torchvision do); 16-bit grey keeps its high byte, a transparent
colour of it is ignored; any other picture with transparency is laid over white; all else by Pillow's conversion to RGB
(CMYK and palettes too). Truncated: refused.
"""

import io
import re
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

from .errors import CorruptionError, UsageError

PICTURE_RULES = 1
MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
RGB = npt.NDArray[np.uint8]


class PictureRefused(Exception):
    """A picture that gets no row: `reason` is a short code, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def ignore_metadata_warnings() -> None:
    """Ignore Pillow's warnings of odd metadata in this process; programs and their workers call it.

    `decode_rgb` cannot: warnings.catch_warnings is not safe in threads.
    """
    warnings.filterwarnings("ignore", module="PIL")


def picture_extension(data: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes.

    Raises: PictureRefused for anything else.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise PictureRefused("empty" if not data else "format", f"expected JPEG, PNG or WebP; it begins {data[:12]!r}")


def decode_rgb(data: bytes) -> RGB:
    """The picture as uint8 [H, W, 3], by the rule in this file's head.

    Raises: PictureRefused with the reason empty, format, too-large or damaged.
    """
    picture_extension(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PictureRefused("too-large", f"{picture.width}x{picture.height} is over {MAX_PIXELS} pixels")
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except Image.DecompressionBombError as error:
        raise PictureRefused("too-large", str(error)) from error
    except (PictureRefused, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors on damaged files
        # Pillow names the buffer by its address, which differs each time.
        raise PictureRefused("damaged", re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", str(error))) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def resize_rgb(rgb_HW3: RGB, height: int, width: int) -> RGB:
    """Antialiased bicubic resize by Pillow; the same array when the size is right already."""
    if rgb_HW3.shape[:2] == (height, width):
        return rgb_HW3
    return np.asarray(Image.fromarray(rgb_HW3).resize((width, height), Image.Resampling.BICUBIC))


def check_encoding(encoding: str) -> tuple[int, str] | None:
    """(quality, subsampling) of "jpeg:QUALITY:444|422|420", None for "png".

    Raises: UsageError for anything else.
    """
    if encoding == "png":
        return None
    known = re.fullmatch("jpeg:0{0,2}([1-9][0-9]?|100):(444|422|420)", encoding)
    if not known:
        raise UsageError(f"view encoding: expected png or jpeg:QUALITY:444|422|420; found {encoding!r}")
    return int(known[1]), known[2]


def encode_view(rgb_HW3: RGB, encoding: str) -> bytes:
    """A rendered view as JPEG or PNG bytes."""
    jpeg = check_encoding(encoding)
    if jpeg is None:
        buffer = io.BytesIO()
        Image.fromarray(rgb_HW3).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()
    quality, subsampling = jpeg
    contiguous = np.ascontiguousarray(rgb_HW3)
    return bytes(simplejpeg.encode_jpeg(contiguous, quality=quality, colorspace="RGB", colorsubsampling=subsampling))


def decode_view_into(data: bytes | memoryview, out_HW3: RGB) -> None:
    """Decode a stored view in place: the one decoder behind the teacher's input and the student's.

    Raises: CorruptionError when the bytes are no picture of that size.
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
        raise CorruptionError(f"expected a view of {height}x{width}; it does not decode: {error}") from error
    if found != (height, width):
        raise CorruptionError(f"expected a view of {height}x{width} pixels; found {found[0]}x{found[1]}")
