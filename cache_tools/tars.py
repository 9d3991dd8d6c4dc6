"""WebDataset tars, written byte for byte the same each time, and their index.

Written with the standard library: `import webdataset` imports torch (2.8 s, measured), which the waist must not.
"""

import io
import math
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .errors import CorruptionError
from .records import read_capped
from .storage import AtomicFile, atomic_file, read_at

Data = TypeVar("Data", bytes, memoryview)
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
TARGETS_DTYPE = np.dtype(INDEX_DTYPE.descr[:3])
VIEW_INDEX_DTYPE = np.dtype(
    INDEX_DTYPE.descr
    + [(name, "<i4") for name in ("top", "left", "height", "width", "flip", "source_height", "source_width")]
)
_HEADER_BYTES = 512
MAX_NPY_BYTES = 1 << 28  # 5 million rows of an index
MAX_NPY_HEADER = 2048  # characters that are parsed


class TarWriter(NamedTuple):
    """A tar of samples; `file` has its size and sha256 at the end."""

    tar: tarfile.TarFile
    file: AtomicFile

    def add(self, key: str, fields: Mapping[str, bytes], picture: str) -> tuple[int, int, int]:
        """Add one sample, `fields` by extension; returns (offset, size, crc32c) of the field `picture`."""
        place = (0, 0, 0)
        for extension, data in fields.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o644
            if extension == picture:
                place = (self.file.bytes + _HEADER_BYTES, len(data), crc32c(data))
            self.tar.addfile(member, io.BytesIO(data))
        self.tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
        return place


@contextmanager
def tar_writer(path: Path) -> Iterator[TarWriter]:
    """A tar that appears whole or not at all.

    The same members in the same order give the same bytes: no clock, user or host enters.
    """
    with (
        atomic_file(path) as file,
        tarfile.open(fileobj=cast(IO[bytes], file), mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        yield TarWriter(tar, file)


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """An index, or any array, as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The array of `dtype` in a .npy file of version 1.0. Bytes behind the array are ignored.

    The header is compared with the size of the file before an array is made: `np.load` allocates first.

    Raises: CorruptionError if the file is missing, or is not a .npy file of `dtype`.
    """
    try:
        data = read_capped(path, MAX_NPY_BYTES)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: expected a .npy file; it is missing") from error
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_NPY_HEADER)
        if header[1:] != (False, np.dtype(dtype)):
            raise ValueError(f"found a header of {header}")
        return np.frombuffer(data, dtype, math.prod(header[0]), file.tell()).reshape(header[0])
    except Exception as error:
        raise CorruptionError(f"{path}: expected a .npy file of {np.dtype(dtype)}; {error}") from error


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
        found = "the crc32c of its picture or mask is not that of the index"
        raise CorruptionError(f"{tar}: row {row}: {found}; run `mcm-cache verify`")
    return data
