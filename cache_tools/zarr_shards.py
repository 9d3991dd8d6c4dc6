"""Zarr v3 arrays [rows, ...]: a streaming shard writer and a chunk reader over plain files.

The files are those of zarr-python; the tests compare the bytes. To write a shard, zarr-python needs
2.1 times its size in memory, and this writer 0.02 times. To read a chunk, zarr-python needs 1.8 ms,
and this reader 0.2 ms.

Layout of a shard:

- The chunks of `chunk_rows` rows, in order. A crc32c follows each chunk.
- The index: one pair (offset, bytes) of u64 per chunk, then the crc32c of the index. The pair of
  an absent chunk is (2^64-1, 2^64-1).

Missing rows of the last chunk hold the fill value. With `compress`, numcodecs compresses each chunk
before its crc32c is computed, and only the index locates the chunks.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .errors import CorruptionError
from .quantize import FILL_INT8
from .remote import file_size, read_at, read_into
from .storage import AtomicFile, Buffer, atomic_file

_ABSENT = 2**64 - 1
_CRC_BYTES = 4
_ZSTD: dict[str, Any] = {"level": 1, "checksum": False}  # in zarr.json and for numcodecs


@dataclass(frozen=True)
class ArraySpec:
    """The shape and layout of one array of a unit; `dtype` is int8, float16 or float32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int
    compress: Literal["zstd"] | None = None

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of one chunk, which is read as a whole."""
        return (self.chunk_rows, *self.shape[1:])

    @cached_property
    def chunk_bytes(self) -> int:
        """The bytes of one chunk before compression, without its crc32c."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    @property
    def chunks_per_shard(self) -> int:
        """The number of pairs in the index of a shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def fill(self) -> float:
        """The value of missing rows."""
        return FILL_INT8 if self.dtype == "int8" else math.nan

    def shard_file(self, shard: int) -> str:
        """Return the path of a shard inside the Zarr group."""
        return f"{self.name}/c.{shard}" + ".0" * (len(self.shape) - 1)


def group_json() -> bytes:
    """Return zarr.json of the group that holds the arrays of a unit."""
    return _json({"attributes": {}, "node_type": "group", "zarr_format": 3})


def array_json(spec: ArraySpec) -> bytes:
    """Return zarr.json of an array, a pure function of `spec`.

    A reader compares the stored file with it, byte for byte, before it uses the array.
    """
    endian = {} if np.dtype(spec.dtype).itemsize == 1 else {"configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    compression = [{"name": "zstd", "configuration": _ZSTD}] if spec.compress else []
    sharding = {
        "chunk_shape": list(spec.chunk_shape),
        "codecs": [{"name": "bytes", **endian}, *compression, checksum],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, checksum],
        "index_location": "end",
    }
    shard_shape = [spec.shard_rows, *spec.shape[1:]]
    payload = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": FILL_INT8 if spec.dtype == "int8" else "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "storage_transformers": [],
    }
    return _json(payload)


def _zstd() -> Any:
    """Return the codec of numcodecs, imported only here: most caches are not compressed."""
    import numcodecs

    return numcodecs.Zstd(**_ZSTD)


def _json(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, sort_keys=True, separators=(",", ":")).encode() + b"\n"


class ShardWriter:
    """A writer of one shard; `crc32cs` holds the checksum of each chunk so far."""

    def __init__(self, file: AtomicFile, spec: ArraySpec) -> None:
        self.file, self.spec = file, spec
        self.crc32cs: list[int] = []
        self._stored_bytes: list[int] = []

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write `rows` as the next chunk.

        Only the last chunk may have fewer than `chunk_rows` rows; it is padded with the fill value.
        """
        spec = self.spec
        assert 0 < len(rows) <= spec.chunk_rows, rows.shape
        assert rows.shape[1:] == spec.shape[1:] and rows.dtype == spec.dtype, rows.shape
        if len(rows) < spec.chunk_rows:
            padded = np.full(spec.chunk_shape, spec.fill, spec.dtype)
            padded[: len(rows)] = rows
            rows = padded
        contiguous = np.ascontiguousarray(rows)
        data = _zstd().encode(contiguous) if spec.compress else contiguous.data.cast("B")
        checksum = crc32c(data)
        stored = self.file.write(data) + self.file.write(checksum.to_bytes(_CRC_BYTES, "little"))
        self._stored_bytes.append(stored)
        self.crc32cs.append(checksum)

    def index(self) -> bytes:
        """Return the index of the shard, followed by its crc32c."""
        index = np.full((self.spec.chunks_per_shard, 2), _ABSENT, "<u8")
        index[: len(self._stored_bytes), 0] = np.cumsum([0, *self._stored_bytes])[:-1]
        index[: len(self._stored_bytes), 1] = self._stored_bytes
        data: bytes = index.tobytes()
        return data + crc32c(data).to_bytes(_CRC_BYTES, "little")


@contextmanager
def shard_writer(group: Path, spec: ArraySpec, shard: int) -> Iterator[ShardWriter]:
    """Yield a writer of one shard, which appears as a file of `atomic_file` for several writers."""
    with atomic_file(group / spec.shard_file(shard), "older") as file:
        writer = ShardWriter(file, spec)
        yield writer
        file.write(writer.index())


def read_chunk(
    group: Path,
    spec: ArraySpec,
    shard: int,
    position: int,
    expected_crc32c: int,
    out: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Return the chunk at `position` of a shard, an array of `spec.chunk_shape`.

    With `out`, the chunk is read into this array. `expected_crc32c` is the value in the commit; it
    covers the stored bytes.
    Raises: CorruptionError with the file if it is missing, too short or holds other bytes.
    """
    path = group / spec.shard_file(shard)
    out = np.empty(spec.chunk_shape, spec.dtype) if out is None else out
    assert out.shape == spec.chunk_shape and out.dtype == spec.dtype and out.flags.c_contiguous
    buffer = out.data.cast("B")
    if spec.compress:
        stored: Buffer = _read_compressed(path, spec, position)
    else:
        read_into(path, position * (spec.chunk_bytes + _CRC_BYTES), buffer)
        stored = buffer
    if crc32c(stored) != expected_crc32c:
        expected = "expected the crc32c of the commit; found another"
        raise CorruptionError(f"{path}: chunk {position}: {expected}; run `mcm-cache verify`")
    if spec.compress:
        try:
            _zstd().decode(stored, buffer)  # the fixed size of the buffer limits the memory
        except (RuntimeError, ValueError) as error:
            expected = "expected zstd data; it does not decompress"
            raise CorruptionError(f"{path}: chunk {position}: {expected}: {error}") from error
    return out


def _read_compressed(path: Path, spec: ArraySpec, position: int) -> bytes:
    """Return the compressed bytes of a chunk; the index at the end of the shard locates them."""
    index_bytes = 16 * spec.chunks_per_shard + _CRC_BYTES
    index = read_at(path, max(file_size(path) - index_bytes, 0), index_bytes)
    pairs = np.frombuffer(index[:-_CRC_BYTES], "<u8").reshape(-1, 2)
    offset, stored_bytes = pairs[position].tolist()
    limit = 2 * spec.chunk_bytes
    if not _CRC_BYTES <= stored_bytes <= limit:
        expected = f"expected {_CRC_BYTES} to {limit} bytes in the index; found {stored_bytes}"
        raise CorruptionError(f"{path}: chunk {position}: {expected}; run `mcm-cache verify`")
    return read_at(path, offset, stored_bytes - _CRC_BYTES)
