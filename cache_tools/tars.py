"""WebDataset tars, written byte for byte the same each time, and their index.

Written with the standard library: `import webdataset` imports torch (2.8 s, measured), which the waist must not.
"""

import io
import math
import re
import tarfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .errors import CorruptionError
from .records import read_capped
from .storage import AtomicFile, read_at

Data = TypeVar("Data", bytes, memoryview)
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
VIEW_INDEX_DTYPE = np.dtype(
    INDEX_DTYPE.descr
    + [(name, "<i4") for name in ("top", "left", "height", "width", "flip", "source_height", "source_width")]
)
_HEADER_BYTES = 512
MAX_NPY_BYTES = 1 << 28  # 5 million rows of an index
_NPY_HEADER_BYTES = 2048
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': ([^{}]+), 'fortran_order': False, "
    rb"'shape': \((\d{1,12}(?:, \d{1,12})*),?\), \} *\n",
    re.DOTALL,
)


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
                place = (self._tar.offset + _HEADER_BYTES, len(data), crc32c(data))
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
        return place

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error: tarfile's stream would write its rest when it is collected, into a closed file.
        try:
            with suppress(OSError) if kind else nullcontext():
                self._tar.close()
        except BaseException as failed:  # the last write: the file is closed and removed as after any other
            self.file.__exit__(type(failed), failed, None)
            raise
        self.file.__exit__(kind, error, trace)


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """An index, or any array, as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The array of `dtype` in a .npy file, as `encode_npy` writes it: no header is evaluated, no shape believed.

    Raises: CorruptionError when it is missing or no such file.
    """
    return _parse_npy(path, _npy_bytes(path), np.dtype(dtype))


def _npy_bytes(path: Path) -> bytes:
    try:
        return read_capped(path, MAX_NPY_BYTES)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: expected a .npy file; it is missing") from error


def _parse_npy(path: Path, data: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    header = _NPY.match(data[:_NPY_HEADER_BYTES])
    if header and header[1].decode("latin1") == repr(np.lib.format.dtype_to_descr(dtype)):
        shape = [int(size) for size in header[2].replace(b",", b"").split()]
        if math.prod(shape) * dtype.itemsize == len(data) - header.end():
            return np.frombuffer(data, dtype, offset=header.end()).reshape(shape)
    raise CorruptionError(f"{path}: expected a .npy file of {dtype} in {len(data)} bytes; its header says otherwise")


def seal(data: bytes) -> bytes:
    """`data` and its crc32c: for an array that no commit vouches for. Readers of .npy stop before the four bytes."""
    return data + crc32c(data).to_bytes(4, "little")


def read_sealed_npy(path: Path) -> npt.NDArray[Any]:
    """The float32 array of a sealed .npy file.

    Raises: CorruptionError when it is missing or not as it was written.
    """
    data = _npy_bytes(path)
    if seal(data[:-4]) != data:
        raise CorruptionError(f"{path}: expected an array with its crc32c; it is damaged; run `mcm-cache verify`")
    return _parse_npy(path, data[:-4], np.dtype(np.float32))


def read_picture(tar: Path, place: Any, row: int) -> bytes:
    """The picture of a row at a `place` of its index, its crc32c checked.

    Raises: CorruptionError naming the file and row.
    """
    return checked_picture(tar, read_at(tar, int(place["offset"]), int(place["size"])), int(place["crc32c"]), row)


def checked_picture(tar: Path, data: Data, expected_crc32c: int, row: int) -> Data:
    """`data`, whose crc32c is as its index says.

    Raises: CorruptionError naming the file and row.
    """
    if crc32c(data) != expected_crc32c:
        raise CorruptionError(f"{tar}: row {row}: the picture's crc32c is not its index's; run `mcm-cache verify`")
    return data
