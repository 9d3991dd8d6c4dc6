"""Arrays: byte for byte what zarr-python writes, read back chunk by chunk, every damage named."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_tools.errors import CorruptionError
from cache_tools.storage import write_atomic
from cache_tools.zarr_shards import ArraySpec, array_json, crc32c, read_chunk, shard_writer


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == crc32c(memoryview(bytearray(b"123456789"))) == 0xE3069283


def write(group: Path, spec: ArraySpec, data: np.ndarray) -> list[int]:
    crc32cs = []
    write_atomic(group / spec.name / "zarr.json", array_json(spec))
    for shard in range(-(-len(data) // spec.shard_rows)):
        rows = data[shard * spec.shard_rows : (shard + 1) * spec.shard_rows]
        with shard_writer(group, spec, shard) as writer:
            for start in range(0, len(rows), spec.chunk_rows):
                writer.append(rows[start : start + spec.chunk_rows])
        crc32cs += writer.crc32cs
    return crc32cs


def codecs(spec: ArraySpec) -> list[object]:
    """zarr-python's, asked for what docs/format.md writes."""
    return [*([zarr.codecs.ZstdCodec(level=1)] if spec.compress else []), zarr.codecs.Crc32cCodec()]


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("tail", [(3, 5), (5,), ()])
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_same_bytes_as_zarr_python(tmp_path: Path, dtype: str, tail: tuple[int, ...], compress: str | None) -> None:
    spec = ArraySpec("patch", (40, *tail), dtype, 16, 32, compress)
    data = np.random.default_rng(0).integers(0, 100, spec.shape).astype(dtype)
    write(tmp_path / "ours", spec, data)
    reference = zarr.create_array(
        tmp_path / "theirs" / "patch", shape=spec.shape, chunks=spec.chunk_shape, shards=(32, *tail), dtype=dtype,
        fill_value=spec.fill, compressors=codecs(spec),
        chunk_key_encoding={"name": "default", "separator": "."}, config={"write_empty_chunks": True},
    )  # fmt: skip
    reference[:] = data
    ours = zarr.open_array(tmp_path / "ours" / "patch", mode="r")
    assert (ours[:] == data).all() and ours.metadata.codecs == reference.metadata.codecs
    for shard in (0, 1):
        name = spec.shard_file(shard)
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_compressed_chunks_come_back_and_damage_is_named(tmp_path: Path) -> None:
    spec = ArraySpec("patch", (40, 300), "int8", 16, 32, "zstd")
    data = np.random.default_rng(0).integers(0, 9, spec.shape).astype(np.int8)
    crc32cs = write(tmp_path, spec, data)
    path = tmp_path / spec.shard_file(0)
    good = path.read_bytes()
    assert len(good) < 0.8 * 32 * 300
    assert (read_chunk(tmp_path, spec, 0, 1, crc32cs[1]) == data[16:32]).all()
    for position in range(0, len(good), 7):  # chunk 0 or 1, a checksum, or the index
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        read = []
        for number in (0, 1):
            try:
                read.append((read_chunk(tmp_path, spec, 0, number, crc32cs[number]) == data[16 * number :][:16]).all())
            except CorruptionError as error:
                assert str(path) in str(error)
        assert all(read)
    for damaged in (good[:-1], good[-36:], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match="c.0.0"):
            read_chunk(tmp_path, spec, 0, 0, crc32cs[0])


def test_a_chunk_that_would_unpack_to_more_is_refused(tmp_path: Path) -> None:
    small, large = (ArraySpec("patch", (16, n), "int8", 16, 16, "zstd") for n in (20_000, 30_000_000))
    crc32cs = write(tmp_path, large, np.zeros(large.shape, np.int8))
    with pytest.raises(CorruptionError, match="does not decompress"):
        read_chunk(tmp_path, small, 0, 0, crc32cs[0])


def test_chunks_come_back_and_damage_is_named(tmp_path: Path) -> None:
    spec = ArraySpec("patch", (40, 3), "float16", 16, 32)
    data = np.arange(120).reshape(40, 3).astype(np.float16)
    crc32cs = write(tmp_path, spec, data)
    assert (read_chunk(tmp_path, spec, 0, 1, crc32cs[1]) == data[16:32]).all()
    last = read_chunk(tmp_path, spec, 1, 0, crc32cs[2])
    assert (last[:8] == data[32:]).all() and np.isnan(last[8:]).all()  # fill is never data
    path = tmp_path / spec.shard_file(0)
    good = path.read_bytes()
    for damaged in (good[:90], b"", good[:50] + bytes([good[50] ^ 1]) + good[51:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match="c.0.0"):
            read_chunk(tmp_path, spec, 0, 0, crc32cs[0])


def test_a_shard_that_fails_does_not_appear(tmp_path: Path) -> None:
    spec = ArraySpec("patch", (40, 3), "int8", 16, 32)
    with pytest.raises(RuntimeError), shard_writer(tmp_path, spec, 0) as writer:
        writer.append(np.zeros((16, 3), np.int8))
        raise RuntimeError
    assert not list(tmp_path.rglob("c.*"))
