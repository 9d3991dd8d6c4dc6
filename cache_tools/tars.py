"""WebDataset tars, written byte for byte the same each time, and their index.

Written with the standard library: `import webdataset` imports torch (2.8 s, measured), which the waist must not.
"""

import io
import tarfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import crc32c
import numpy as np
import numpy.typing as npt

from .errors import CorruptionError
from .storage import AtomicFile

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
VIEW_INDEX_DTYPE = np.dtype(
    INDEX_DTYPE.descr
    + [(name, "<i4") for name in ("top", "left", "height", "width", "flip", "source_height", "source_width")]
)
_HEADER_BYTES = 512


class TarShardWriter:
    """A tar that appears whole or not at all; `add` returns where the picture lies.

    The same members in the same order give the same bytes: no clock, user or host enters.
    """

    def __init__(self, path: Path) -> None:
        self.file = AtomicFile(path)

    def __enter__(self) -> "TarShardWriter":
        self.file.__enter__()
        self._tar = tarfile.open(fileobj=cast(IO[bytes], self.file), mode="w|", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, fields: Mapping[str, bytes], picture: str) -> tuple[int, int, int]:
        """Add one sample, `fields` by extension; returns (offset, size, crc32c) of the field `picture`."""
        place = (0, 0, 0)
        for extension, data in fields.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o644
            if extension == picture:
                place = (self._tar.offset + _HEADER_BYTES, len(data), crc32c.crc32c(data))
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
        return place

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error: tarfile's stream would write its rest when it is collected, into a closed file.
        with suppress(OSError) if kind else nullcontext():
            self._tar.close()
        self.file.__exit__(kind, error, trace)


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """An index, or any array, as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array in a .npy file.

    Raises: CorruptionError when it is missing or no .npy.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OSError) as error:
        raise CorruptionError(f"{path}: expected a .npy file; it does not read: {error}") from error
    return array


def seal(data: bytes) -> bytes:
    """`data` and its crc32c: for an array that no commit vouches for. Readers of .npy stop before the four bytes."""
    return data + int(crc32c.crc32c(data)).to_bytes(4, "little")


def read_sealed_npy(path: Path) -> npt.NDArray[Any]:
    """The array of a sealed .npy file.

    Raises: CorruptionError when it is missing or not as it was written.
    """
    data = path.read_bytes() if path.is_file() else b""
    if seal(data[:-4]) != data:
        raise CorruptionError(
            f"{path}: expected an array with its crc32c; it is missing or damaged; run `mcm-cache verify`"
        )
    return read_npy(path)


def checked_picture(tar: Path, data: bytes, expected_crc32c: int, row: int) -> bytes:
    """`data`, whose crc32c is as its index says.

    Raises: CorruptionError naming the file and row.
    """
    if crc32c.crc32c(data) != expected_crc32c:
        raise CorruptionError(f"{tar}: row {row}: the picture's crc32c is not its index's; run `mcm-cache verify`")
    return data
