"""WebDataset tars with reproducible bytes, and their index.

The standard library writes them, because `import webdataset` imports torch (2.8 s, measured), and
cache_tools must not import torch.
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
from .remote import read_at
from .storage import AtomicFile, atomic_file

Data = TypeVar("Data", bytes, memoryview)
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
TARGETS_DTYPE = np.dtype(INDEX_DTYPE.descr[:3])
_VIEW_FIELDS = ("top", "left", "height", "width", "flip", "source_height", "source_width")
VIEW_INDEX_DTYPE = np.dtype(INDEX_DTYPE.descr + [(name, "<i4") for name in _VIEW_FIELDS])
_HEADER_BYTES = 512
MAX_NPY_BYTES = 1 << 28  # an index of 5 million rows
MAX_NPY_HEADER = 2048  # characters


class TarWriter(NamedTuple):
    """A writer of samples to a tar; `file` counts and hashes its bytes."""

    tar: tarfile.TarFile
    file: AtomicFile

    def add(self, key: str, fields: Mapping[str, bytes], indexed: str) -> tuple[int, int, int]:
        """Add one sample; `fields` maps each extension to its bytes.

        Returns (offset, size, crc32c) of the field `indexed`.
        """
        entry = (0, 0, 0)
        for extension, data in fields.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o644
            if extension == indexed:
                entry = (self.file.bytes + _HEADER_BYTES, len(data), crc32c(data))
            self.tar.addfile(member, io.BytesIO(data))
        self.tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        return entry


@contextmanager
def tar_writer(path: Path) -> Iterator[TarWriter]:
    """Yield a writer of a tar that appears at `path` complete or not at all.

    The same members in the same order give the same bytes: the tar holds no time, user or host.
    """
    with (
        atomic_file(path, "older") as file,
        tarfile.open(fileobj=cast(IO[bytes], file), mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        yield TarWriter(tar, file)


def encode_npy(array: npt.NDArray[Any]) -> bytes:
    """Return the bytes of a .npy file with `array`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Return the array of `dtype` in a .npy file of version 1.0; bytes after the array are ignored.

    The array is a view of the bytes of the file, so a wrong header allocates no memory, unlike in
    `np.load`.

    Raises: CorruptionError if the file is missing or is not a .npy file of `dtype`.
    """
    try:
        data = read_capped(path, MAX_NPY_BYTES)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: expected a .npy file; found nothing") from error
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_NPY_HEADER)
        if header[1:] != (False, np.dtype(dtype)):
            raise ValueError(f"found a header of {header}")
        return np.frombuffer(data, dtype, math.prod(header[0]), file.tell()).reshape(header[0])
    except Exception as error:
        expected = f"expected a .npy file of {np.dtype(dtype)}"
        raise CorruptionError(f"{path}: {expected}; {error}") from error


def read_picture(tar: Path, entry: Any, row: int) -> bytes:
    """Return the picture, mask or boxes that `entry` of an index locates, after a crc32c check.

    Raises: CorruptionError with the file and the row.
    """
    data = read_at(tar, int(entry["offset"]), int(entry["size"]))
    return checked_picture(tar, data, int(entry["crc32c"]), row)


def checked_picture(tar: Path, data: Data, expected_crc32c: int, row: int) -> Data:
    """Return `data` if its crc32c is the one in the index.

    Raises: CorruptionError with the file and the row.
    """
    if crc32c(data) != expected_crc32c:
        expected = "expected the crc32c of the index for the picture, mask or boxes; found another"
        raise CorruptionError(f"{tar}: row {row}: {expected}; run `mcm-cache verify`")
    return data
