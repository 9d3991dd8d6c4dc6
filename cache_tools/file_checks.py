"""One sequential read of a committed file: its sha256, every checksum inside it, and what its bytes must say.

The pieces that `OnePass.take` returns lie in one buffer that the next call fills anew: a chunk or 16 pictures are still
near when crc32c and sha256 see them, and a shard never lies in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from .arrays import ArraySpec, read_chunk, shard_index
from .cache import index_crc32cs
from .dataset import CHUNK_ROWS, row_key
from .errors import CorruptionError
from .identity import Commit, FileEntry
from .images import PictureRefused, picture_extension, view_size
from .quantize import FILL_INT8
from .storage import read_at
from .tars import VIEW_INDEX_DTYPE, encode_npy

_TAR_BLOCK = 512
_CRC_BYTES = 4


class OnePass:
    """Reads a file of `entry.bytes` from its begin to its end; with `hashed`, its sha256 must be the entry's.

    Raises: CorruptionError naming the file.
    """

    def __init__(self, path: Path, entry: FileEntry, hashed: bool) -> None:
        self.path, self.entry, self.left = path, entry, entry.bytes
        self._digest = hashlib.sha256() if hashed else None
        self._buffer = bytearray()

    def __enter__(self) -> "OnePass":
        self._file = open(self.path, "rb", buffering=0)
        return self

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, valid until the next call."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view, got = memoryview(self._buffer)[:size], 0
        while got < size and (read := self._file.readinto(view[got:])):
            got += read
        if got < size:
            raise CorruptionError(f"{self.path}: expected {self.entry.bytes} bytes; it ends before")
        if self._digest:
            self._digest.update(view)
        self.left -= size
        return view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._digest and self._digest.hexdigest() != self.entry.sha256:
            raise CorruptionError(f"{self.path}: its sha256 is not the one recorded")


def check_size(path: Path, entry: FileEntry) -> None:
    """Raises: CorruptionError when the file is missing or has another size."""
    found = path.stat().st_size if path.is_file() else None
    if found != entry.bytes:
        raise CorruptionError(f"{path}: expected {entry.bytes} bytes; found {'no file' if found is None else found}")


def check_view_index(path: Path, commit: Commit, entry: FileEntry, full: bool) -> npt.NDArray[np.void]:
    """The index of a shard's views, every 16 records against the commit's crc32c."""
    with OnePass(path, entry, full) as file:
        data = bytes(file.take(entry.bytes))
    index = np.frombuffer(data[-commit.rows * VIEW_INDEX_DTYPE.itemsize :], VIEW_INDEX_DTYPE)
    if encode_npy(index) != data or index_crc32cs(index) != commit.chunk_crc32c["index"]:
        raise CorruptionError(f"{path}: expected the {commit.rows} records whose crc32c the commit holds; found others")
    return index


def check_array(
    group: Path, spec: ArraySpec, shard: int, crc32cs: Sequence[int], entry: FileEntry, full: bool, keep: bool = False
) -> npt.NDArray[Any] | None:
    """Every chunk of an array's shard against its crc32c, and the index behind them; `full`: sha256 and finiteness.

    Returns the rows with `keep`.
    """
    path = group / spec.shard_file(shard)
    sizes, kept = _stored_sizes(path, spec, len(crc32cs), entry), []
    rows = min(spec.shard_rows, spec.shape[0] - shard * spec.shard_rows)
    with OnePass(path, entry, full) as data:
        for position, (size, expected) in enumerate(zip(sizes, crc32cs, strict=True)):
            stored = data.take(size)
            body, checksum = stored[:-_CRC_BYTES], int.from_bytes(stored[-_CRC_BYTES:], "little")
            if crc32c.crc32c(body) != expected or checksum != expected:
                raise CorruptionError(f"{path}: chunk {position}: its crc32c is not the commit's")
            if full and (not spec.compress or spec.dtype == "float16"):
                chunk = read_chunk(group, spec, shard, position, expected) if spec.compress else _view(body, spec)
                chunk = chunk[: rows - position * spec.chunk_rows]
                if not finite(chunk):
                    raise CorruptionError(f"{path}: chunk {position}: not every value is one that is finite and data")
                if keep:
                    kept.append(chunk.copy())
        if data.take(data.left) != shard_index(spec, sizes):
            raise CorruptionError(f"{path}: the index at its end is not that of its chunks")
    return np.concatenate(kept) if kept else None


def _view(body: memoryview, spec: ArraySpec) -> npt.NDArray[Any]:
    return np.frombuffer(body, spec.dtype).reshape(spec.chunk_shape)


def _stored_sizes(path: Path, spec: ArraySpec, chunks: int, entry: FileEntry) -> list[int]:
    """Bytes of each chunk and its crc32c; of compressed ones only the index at the end of the file knows."""
    sizes = [spec.chunk_bytes + _CRC_BYTES] * chunks
    index_bytes = len(shard_index(spec, []))
    if spec.compress:
        start = max(0, entry.bytes - index_bytes)
        sizes = np.frombuffer(read_at(path, start, index_bytes), "<u8", 2 * chunks)[1::2].tolist()
    if sum(sizes) != entry.bytes - index_bytes or min(sizes) < _CRC_BYTES:
        raise CorruptionError(f"{path}: its chunks and their index do not make {entry.bytes} bytes")
    return sizes


def finite(chunk: npt.NDArray[Any]) -> bool:
    """Whether every value is finite, and no int8 code the fill value, which is never data."""
    if chunk.dtype == np.float16:  # an exponent of ones is what is not finite: two maxima take a third of the time
        return bool(chunk.view(np.int16).max() < 0x7C00 and chunk.view(np.uint16).max() < 0xFC00)
    if chunk.dtype == np.int8:
        return bool(chunk.min() != FILL_INT8)
    return bool(np.isfinite(chunk).all())


def check_tar(
    path: Path,
    index: npt.NDArray[np.void],
    row0: int,
    entry: FileEntry,
    full: bool,
    size: tuple[int, int] | None = None,
) -> None:
    """Every picture against the crc32c of its index; `full`: sha256, every member in its place, pictures of `size`."""
    table: Any = index
    starts = table["offset"].astype(np.int64) - _TAR_BLOCK
    ends = [*starts[CHUNK_ROWS::CHUNK_ROWS].tolist(), entry.bytes]
    if starts[0] != 0 or (np.diff(starts) <= table["size"][:-1]).any() or entry.bytes <= starts[-1] + table["size"][-1]:
        raise CorruptionError(f"{path}: its index names places that do not follow one another in {entry.bytes} bytes")
    with OnePass(path, entry, full) as data:
        for first, end in zip(range(0, len(index), CHUNK_ROWS), ends, strict=True):
            base = entry.bytes - data.left
            piece, group = data.take(end - base), table[first : first + CHUNK_ROWS]
            pictures = [piece[int(o) - base :][: int(n)] for o, n in zip(group["offset"], group["size"], strict=True)]
            for number, (picture, expected) in enumerate(zip(pictures, group["crc32c"].tolist(), strict=True)):
                if crc32c.crc32c(picture) != expected:
                    row = row0 + first + number
                    raise CorruptionError(f"{path}: row {row}: the picture's crc32c is not its index's")
            if full:
                _check_members(path, piece, base, group, row0 + first)
                if size and (odd := [found for p in pictures if (found := view_size(p)) != size]):
                    raise CorruptionError(f"{path}: rows {row0 + first}+: expected views of {size}; found {odd[0]}")


def _check_members(path: Path, piece: memoryview, base: int, group: Any, row0: int) -> None:
    """Raises: CorruptionError where the tar's own headers do not tell of the rows what the index tells."""
    try:
        members = list(_members(piece))
        each = len(members) // len(group)
        for number, (offset, size, label) in enumerate(group[["offset", "size", "label"]].tolist()):
            (picture, start, length), (cls, at, digits), *more = members[number * each : number * each + each]
            key, kind = row_key(row0 + number), picture_extension(bytes(piece[start : start + 12]))
            names = [picture, cls, *(name for name, _, _ in more)]
            if names != [f"{key}.{extension}" for extension in (kind, "cls", "json")[:each]]:
                raise ValueError(f"found {names} as row {key}")
            if (base + start, length, int(piece[at : at + digits])) != (offset, size, label):
                raise ValueError(f"row {key} lies elsewhere or has another label than the index says")
        if len(members) != each * len(group):
            raise ValueError(f"found {len(members)} members for {len(group)} rows")
    except (ValueError, PictureRefused) as error:
        raise CorruptionError(f"{path}: expected the members of its index, in order: {error}") from error


def _members(piece: memoryview) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each member; a block of zeros ends a tar. 25 times faster than tarfile's headers."""
    start = 0
    while start < len(piece) and piece[start]:
        header = bytes(piece[start : start + 136])
        size = int(header[124:135], 8)
        yield header[:100].rstrip(b"\0").decode("ascii"), start + _TAR_BLOCK, size
        start += _TAR_BLOCK + -(-size // _TAR_BLOCK) * _TAR_BLOCK
