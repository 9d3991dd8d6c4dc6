"""One sequential read of a committed file: its sha256, every checksum inside it, and what its bytes must say.

The pieces that `OnePass.take` returns lie in one buffer that the next call fills anew, so that a shard never lies in
memory. Where a few microseconds a row would show beside the sha256 of its 180 KB, work is done for 16 rows at once.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .arrays import ArraySpec, read_chunk, shard_index
from .cache import index_crc32cs
from .dataset import row_key
from .errors import CorruptionError
from .identity import Commit, FileEntry
from .images import PictureRefused, picture_extension, view_size
from .storage import read_at
from .tars import VIEW_INDEX_DTYPE, encode_npy

_TAR_BLOCK = 512
_CRC_BYTES = 4
_READ_BYTES = 1 << 18  # what sha256 gets while it is still in the second-level cache
_HEAD_BYTES = 177  # start, JFIF, two quantisation tables and the frame header, where libjpeg writes the size
_TAR_ROWS = 64  # walked at once
_OCTAL = 8 ** np.arange(10, -1, -1)


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

    def take(self, size: int, summed: bool = False) -> memoryview:
        """The next `size` bytes, valid until the next call; with `summed`, `crc32c` is theirs."""
        if size > self.left:
            raise CorruptionError(f"{self.path}: expected {self.entry.bytes} bytes; its parts are larger")
        if len(self._buffer) < size:
            self._buffer = bytearray(min(2 * size, self.entry.bytes))
        view, got = memoryview(self._buffer)[:size], 0
        self.crc32c = 0
        while got < size and (read := self._file.readinto(view[got : got + _READ_BYTES])):
            piece = view[got : got + read]
            if self._digest:
                self._digest.update(piece)
            if summed:
                self.crc32c = crc32c(piece, self.crc32c)
            got += read
        if got < size:
            raise CorruptionError(f"{self.path}: expected {self.entry.bytes} bytes; it ends before")
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
    if len(data) <= commit.rows * VIEW_INDEX_DTYPE.itemsize:
        raise CorruptionError(f"{path}: expected {commit.rows} records and a header; found {len(data)} bytes")
    index = np.frombuffer(data[-commit.rows * VIEW_INDEX_DTYPE.itemsize :], VIEW_INDEX_DTYPE)
    if encode_npy(index) != data or index_crc32cs(index) != commit.chunk_crc32c["index"]:
        raise CorruptionError(f"{path}: expected the {commit.rows} records whose crc32c the commit holds; found others")
    return index


def check_array(
    group: Path,
    spec: ArraySpec,
    shard: int,
    crc32cs: Sequence[int],
    entry: FileEntry,
    see: Callable[[npt.NDArray[Any]], None] | None,
) -> None:
    """Every chunk of an array's shard against its crc32c, and the index behind them.

    With `see`, also the sha256 and that every value is finite; it is shown the rows of each chunk, of compressed codes
    the first alone.
    """
    path = group / spec.shard_file(shard)
    sizes = _stored_sizes(path, spec, len(crc32cs), entry)
    rows = min(spec.shard_rows, spec.shape[0] - shard * spec.shard_rows)
    with OnePass(path, entry, see is not None) as data:
        for position, (size, expected) in enumerate(zip(sizes, crc32cs, strict=True)):
            body = data.take(size - _CRC_BYTES, summed=True)
            if data.crc32c != expected:
                raise CorruptionError(f"{path}: chunk {position}: its crc32c is not the commit's")
            if see and (not spec.compress or spec.dtype == "float16" or position == 0):
                chunk = read_chunk(group, spec, shard, position, expected) if spec.compress else _view(body, spec)
                chunk = chunk[: rows - position * spec.chunk_rows]
                if not finite(chunk):
                    raise CorruptionError(f"{path}: chunk {position}: not every value is finite")
                see(chunk)
            if data.take(_CRC_BYTES) != expected.to_bytes(_CRC_BYTES, "little"):
                raise CorruptionError(f"{path}: chunk {position}: the crc32c behind it is not its own")
        if data.take(data.left) != shard_index(spec, sizes):
            raise CorruptionError(f"{path}: the index at its end is not that of its chunks")


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
    """Whether every value is finite."""
    if chunk.dtype == np.float16:  # an exponent of ones is what is not finite: two maxima are fastest, while it is near
        parts = np.split(chunk.reshape(-1), range(_READ_BYTES, chunk.size, _READ_BYTES))
        return all(p.view(np.int16).max() < 0x7C00 and p.view(np.uint16).max() < 0xFC00 for p in parts)
    return chunk.dtype.kind != "f" or bool(np.isfinite(chunk).all())


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
    ends = [*starts[_TAR_ROWS::_TAR_ROWS].tolist(), entry.bytes]
    if starts[0] != 0 or (np.diff(starts) <= table["size"][:-1]).any() or entry.bytes <= starts[-1] + table["size"][-1]:
        raise CorruptionError(f"{path}: its index names places that do not follow one another in {entry.bytes} bytes")
    sizes: dict[bytes, tuple[int, int]] = {}  # views of one encoder begin alike
    with OnePass(path, entry, full) as data:
        for first, end in zip(range(0, len(index), _TAR_ROWS), ends, strict=True):
            base = entry.bytes - data.left
            piece, group = data.take(end - base), table[first : first + _TAR_ROWS]
            pictures = [piece[int(o) - base :][: int(n)] for o, n in zip(group["offset"], group["size"], strict=True)]
            for number, (picture, expected) in enumerate(zip(pictures, group["crc32c"].tolist(), strict=True)):
                if crc32c(picture) != expected:
                    row = row0 + first + number
                    raise CorruptionError(f"{path}: row {row}: the picture's crc32c is not its index's")
            if full:
                _check_members(path, piece, base, group, row0 + first)
                for picture in pictures if size else ():
                    head = bytes(picture[:_HEAD_BYTES])
                    if head not in sizes:
                        sizes = {head: view_size(picture)}
                    if sizes[head] != size:
                        found = f"expected views of {size}; found {sizes[head]}"
                        raise CorruptionError(f"{path}: one of the rows from {row0 + first} on: {found}")


def _check_members(path: Path, piece: memoryview, base: int, group: Any, row0: int) -> None:
    """Walk the tar's own headers, one member of all rows at a time: KEY.jpg, KEY.cls, in a DATASET KEY.json.

    Raises: CorruptionError where they do not tell of the rows what the index tells.
    """
    data, keys = np.frombuffer(piece, np.uint8), [row_key(row0 + number) for number in range(len(group))]
    starts = at = group["offset"].astype(np.int64) - base - _TAR_BLOCK
    try:
        kinds = [picture_extension(bytes(piece[start : start + 12])) for start in (starts + _TAR_BLOCK).tolist()]
        for extensions in (kinds, ["cls"] * len(keys), ["json"] * len(keys)):
            sizes = _member_sizes(data, at, [f"{key}.{name}" for key, name in zip(keys, extensions, strict=True)])
            begins = (at + _TAR_BLOCK).tolist()
            if extensions is kinds and sizes.tolist() != group["size"].tolist():
                raise ValueError(f"between rows {keys[0]} and {keys[-1]} one has another size than in the index")
            if extensions[0] == "cls":
                labels = [int(piece[begin : begin + size]) for begin, size in zip(begins, sizes.tolist(), strict=True)]
                if labels != group["label"].tolist():
                    raise ValueError(f"the labels {labels} from row {keys[0]} on are not the index's")
            at = at + _TAR_BLOCK + -(-sizes // _TAR_BLOCK) * _TAR_BLOCK
            ended = (at[:-1] == starts[1:]).all() and not data[at[-1] :].any()  # a tar ends with zeros
            if ended and extensions is not kinds:
                return
        raise ValueError(f"something else lies between rows {keys[0]} and {keys[-1]}")
    except (ValueError, PictureRefused) as error:
        raise CorruptionError(f"{path}: expected the members of its index, in order: {error}") from error


def _member_sizes(data: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.int64]:
    """Sizes of the members whose headers begin at `at` and bear these names."""
    if at[-1] + _TAR_BLOCK > len(data):
        raise ValueError(f"found no {names[-1]}")
    headers = data[at[:, None] + np.arange(135)]
    found, digits = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist(), headers[:, 124:135] - ord("0")
    if odd := [pair for pair in zip(names, found, strict=True) if pair[0].encode() != pair[1]]:
        raise ValueError(f"expected {odd[0][0]}, found {odd[0][1]!r}")
    if digits.max() > 7:
        raise ValueError(f"from {names[0]} on, a size is no number")
    return np.asarray(digits.astype(np.int64) @ _OCTAL)
