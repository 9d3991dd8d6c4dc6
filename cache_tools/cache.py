"""CACHE: views and teacher features in units that are whole, checked and bound together by commits.

B rows, N tokens, C channels. See docs/format.md for every byte.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .dataset import CHUNK_ROWS, shard_name
from .errors import CorruptionError, IdentityError, UsageError, found_at
from .quantize import Floats, decode
from .records import read_record, record_sha256, sha256_hex
from .schema import CacheIdentity, Commit, Manifest, ProbeRecord
from .storage import file_sha256, read_at
from .tars import INDEX_DTYPE, VIEW_INDEX_DTYPE, checked_picture, encode_npy, read_npy
from .zarr_shards import array_json, group_json, read_chunk

if TYPE_CHECKING:
    import zarr

_INDEX_HEADER_BYTES = len(encode_npy(np.zeros(0, VIEW_INDEX_DTYPE)))  # numpy pads it, whatever the number of rows
# Shards whose constants stay in memory: 27 MB per 1,024 shards of 1,024 rows and 768 channels. Chunks come
# in random order, so that a small part of ImageNet's 1,252 shards per view would rarely be the right one.
MAX_KNOWN = 16_384
_COMMIT, _VIEW = re.compile(r"([0-9]{6,})\.json"), re.compile(r"v(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Chunk:
    """16 rows (fewer at the end of a split), every byte checked; pictures are still encoded.

    labels int32 [B], codes int8 or float16 [B, N, C], scale float32 [B, N], mean and std float32 [C] (these for int8),
    cls float16 [B, C]. What the dtype does not have is None.
    """

    row0: int
    pictures: list[memoryview]
    labels: npt.NDArray[np.int32]
    codes: npt.NDArray[Any]
    scale: npt.NDArray[Any] | None
    mean: npt.NDArray[np.float32] | None
    std: npt.NDArray[np.float32] | None
    cls: npt.NDArray[np.float16] | None

    @property
    def rows(self) -> int:
        """Rows in this chunk."""
        return len(self.pictures)

    def features(self) -> npt.NDArray[np.float32]:
        """Decoded patch features, float32 [B, N, C]."""
        features: npt.NDArray[np.float32] = decode(self.codes, self.scale, self.mean, self.std)
        return features


class Unit:
    """One view number of one split: `CACHE/train/v0`."""

    def __init__(self, cache: Path, identity: CacheIdentity, split: str, view: int) -> None:
        self.identity, self.split, self.view = identity, split, view
        self.identity_sha256 = record_sha256(identity)
        self.path = cache / split / f"v{view}"
        self.group = self.path / "features.zarr"
        self.rows, self.num_shards = identity.rows[split], identity.shards(split)
        self.num_chunks = -(-self.rows // CHUNK_ROWS)
        self.chunks_per_shard = identity.rows_per_shard // CHUNK_ROWS
        self.specs = identity.arrays(split)

    def __str__(self) -> str:
        return f"{self.split}/v{self.view}"

    def tar(self, shard: int) -> Path:
        """The views of a shard."""
        return self.path / "views" / f"{shard_name(shard)}.tar"

    def index_file(self, shard: int) -> Path:
        """The index of a shard's views."""
        return self.path / "views" / f"{shard_name(shard)}.index.npy"

    def commit_file(self, shard: int) -> Path:
        """The commit of a shard."""
        return self.path / "commits" / f"{shard_name(shard)}.json"

    @property
    def manifest_file(self) -> Path:
        """The manifest: there when the unit is complete."""
        return self.path / "manifest.json"

    def shard_rows(self, shard: int) -> int:
        """Rows of a shard: `rows_per_shard`, fewer in the last."""
        return min(self.identity.rows_per_shard, self.rows - shard * self.identity.rows_per_shard)

    def committed(self) -> list[int]:
        """Shards that have a commit, by one look into the folder."""
        folder = self.path / "commits"
        if not folder.is_dir():
            return []
        found = (_COMMIT.fullmatch(path.name) for path in folder.iterdir())
        return sorted(shard for name in found if name and (shard := int(name[1])) < self.num_shards)

    @property
    def complete(self) -> bool:
        """Whether the manifest is there."""
        return self.manifest_file.is_file()

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, bound to this unit of this cache.

        Raises: CorruptionError or IdentityError.
        """
        manifest = read_record(Manifest, self.manifest_file)
        found = (manifest.identity_sha256, manifest.split, manifest.view, manifest.rows, len(manifest.commits))
        if found != (self.identity_sha256, self.split, self.view, self.rows, self.num_shards):
            raise IdentityError(f"{self.manifest_file}: expected the manifest of {self} of this cache; found {found}")
        return manifest

    def commit(self, shard: int, bound: bool = True) -> Commit:
        """The commit of a shard, bound to its place and, in a complete unit, to the manifest if `bound`.

        Raises: CorruptionError when it is missing, damaged or another's.
        """
        path = self.commit_file(shard)
        if not path.is_file():
            raise CorruptionError(f"{path}: expected the commit of a complete unit; it is missing")
        commit = read_record(Commit, path)
        found = (commit.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)
        if found != (self.identity_sha256, self.split, self.view, shard, self.shard_rows(shard)):
            raise CorruptionError(f"{path}: expected the commit of shard {shard} of {self}; found that of {found[1:]}")
        chunks, channels = -(-commit.rows // CHUNK_ROWS), self.identity.channels
        expected = {name: chunks if spec.chunk_rows == CHUNK_ROWS else 1 for name, spec in self.specs.items()}
        lengths = {name: len(checksums) for name, checksums in commit.chunk_crc32c.items()}
        statistics = (len(commit.channel_mean), len(commit.channel_var))
        if lengths != expected | {"index": chunks} or statistics != (channels, channels):
            raise CorruptionError(f"{path}: expected checksums of {chunks} chunks and statistics; found {lengths}")
        if bound and self.complete and record_sha256(commit) != self.manifest.commits[shard]:
            raise CorruptionError(f"{path}: expected the commit that {self.manifest_file} names; found another")
        return commit

    def check_arrays(self) -> None:
        """Compare every zarr.json with what the identity asks for, before an array is touched.

        Raises: CorruptionError naming the file.
        """
        for path, expected in self.zarr_files().items():
            check_bytes(path, expected)

    def zarr_files(self) -> dict[Path, bytes]:
        """Every zarr.json of the unit and its bytes."""
        arrays = {self.group / name / "zarr.json": array_json(spec) for name, spec in self.specs.items()}
        return {self.group / "zarr.json": group_json(), **arrays}

    @lru_cache(None)  # noqa: B019  the units of a process are few and live as long as it
    def _checksums(self, shard: int) -> dict[str, npt.NDArray[np.uint32]]:
        """crc32c of each chunk of a shard: 31 bytes per chunk (16 of them data) stay in memory, the commit does not."""
        return {name: np.array(values, np.uint32) for name, values in self.commit(shard).chunk_crc32c.items()}

    def stored_index(self, shard: int) -> npt.NDArray[np.void]:
        """The index records of the views of a shard, as they are on disk."""
        size = self.shard_rows(shard) * VIEW_INDEX_DTYPE.itemsize
        return np.frombuffer(read_at(self.index_file(shard), _INDEX_HEADER_BYTES, size), VIEW_INDEX_DTYPE)

    def index(self, shard: int) -> npt.NDArray[np.void]:
        """The index records of the views of a shard.

        Raises: CorruptionError when they are not those of the commit.
        """
        index = self.stored_index(shard)
        if index_crc32cs(index) != tuple(self._checksums(shard)["index"]):
            raise CorruptionError(
                f"{self.index_file(shard)}: expected the records whose crc32c the commit holds; found others;"
                " run `mcm-cache verify`"
            )
        return index

    @lru_cache(MAX_KNOWN)  # noqa: B019
    def _constants(self, shard: int) -> tuple[npt.NDArray[np.void], Floats | None, Floats | None]:
        """What the chunks of a shard share: the index without geometry, the channels' mean and std."""
        records = self.index(shard)[list(INDEX_DTYPE.names or ())].astype(INDEX_DTYPE)
        mean, std = (self._array(name, shard, 0, 1) for name in ("channel_mean", "channel_std"))
        return records, None if mean is None else mean[0], None if std is None else std[0]

    def chunk(self, chunk: int, into: Mapping[str, npt.NDArray[Any]] | None = None) -> Chunk:
        """Rows [16 chunk, 16 chunk + 16) of the unit; pictures, codes and their position agree with the commit.

        `into` may name arrays of 16 rows for `patch`, `scale` and `cls`: a whole chunk is read into them, and
        `cls` only if it is named.
        Raises: CorruptionError naming the file.
        """
        shard, position = divmod(chunk, self.chunks_per_shard)
        row0 = chunk * CHUNK_ROWS
        rows = min(CHUNK_ROWS, self.rows - row0)
        records, mean, std = self._constants(shard)
        index: Any = records[position * CHUNK_ROWS :][:rows]
        # The 16 pictures lie side by side in the tar: one read, headers and labels included.
        start = int(index["offset"][0])
        tar = self.tar(shard)
        data = memoryview(read_at(tar, start, int(index["offset"][-1]) + int(index["size"][-1]) - start))
        spans = zip((index["offset"] - start).tolist(), index["size"].tolist(), index["crc32c"].tolist(), strict=True)
        pictures = [
            checked_picture(tar, data[offset : offset + size], checksum, row0 + i)
            for i, (offset, size, checksum) in enumerate(spans)
        ]
        whole = into if into and rows == CHUNK_ROWS else {}
        codes = self._array("patch", shard, position, rows, whole.get("patch"))
        scale = self._array("scale", shard, position, rows, whole.get("scale"))
        unnamed = into and "cls" not in into
        cls = None if unnamed else self._array("cls", shard, position, rows, whole.get("cls"))
        assert codes is not None
        labels = index["label"].astype(np.int32)
        return Chunk(row0, pictures, labels, codes, scale, mean, std, cls)

    def _array(
        self, name: str, shard: int, position: int, rows: int, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any] | None:
        if name not in self.specs:
            return None
        expected = int(self._checksums(shard)[name][position])
        return read_chunk(self.group, self.specs[name], shard, position, expected, out)[:rows]

    def channel_stats(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and std [C] of the features of all rows, from the commits."""
        commits = map(self.commit, range(self.num_shards))  # one at a time: as Python's numbers each takes 67 KB
        found = [(one.rows, np.array(one.channel_mean), np.array(one.channel_var)) for one in commits]
        weights, means, variances = map(np.array, zip(*found, strict=True))
        mean = np.average(means, axis=0, weights=weights)
        return mean, np.sqrt(np.average(variances + (means - mean) ** 2, axis=0, weights=weights))


class Cache:
    """A CACHE folder opened for reading.

    Raises: UsageError when there is none, CorruptionError or IdentityError when cache.json is damaged or of another
    version.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "cache.json").is_file():
            found = found_at(path)
            raise UsageError(f"{path}: expected a CACHE (cache.json); found {found}; make one with `mcm-cache extract`")
        self.path = path
        self.identity = read_record(CacheIdentity, path / "cache.json")
        self.sha256 = record_sha256(self.identity)

    def units(self, split: str) -> list[Unit]:
        """The units of a split that have begun, by view."""
        folder = self.path / split
        found = (_VIEW.fullmatch(path.name) for path in folder.glob("v*"))
        return [Unit(self.path, self.identity, split, view) for view in sorted(int(name[1]) for name in found if name)]

    def all_units(self) -> list[Unit]:
        """The units of every split."""
        return [unit for split in self.identity.rows for unit in self.units(split)]

    def projection(self) -> npt.NDArray[np.float32]:
        """The teacher's own matrix from its C channels to the space it shares with text, float32 [C, E].

        Raises: UsageError for a teacher without one; CorruptionError.
        """
        path, expected = self.path / "projection.npy", self.identity.teacher.projection_sha256
        if expected is None:
            name = self.identity.teacher.name
            raise UsageError(f"{self.path}: expected a teacher with a projection to its joint space; {name} has none")
        matrix = read_npy(path)
        # The digest is of the values: another byte order, or bytes behind them, would pass it.
        canonical = encode_npy(matrix.astype("<f4")) == path.read_bytes()
        if not canonical or sha256_hex(matrix.tobytes()) != expected:
            raise CorruptionError(f"{path}: its sha256 is not what cache.json says")
        return np.array(matrix, np.float32)

    def complete_units(self, split: str) -> list[Unit]:
        """The units of a split that can be trained on: those with a manifest."""
        return [unit for unit in self.units(split) if unit.complete]

    def zarr(self, split: str, view: int = 0) -> "zarr.Group":
        """The arrays of a complete unit, as a read-only group of zarr-python.

        docs/format.md describes how codes decode. zarr-python reads a missing shard as fill values;
        `Unit.chunk` raises.
        Raises: UsageError naming the complete units; CorruptionError when a zarr.json is changed.
        """
        import zarr  # 0.6 s

        units = {(unit.split, unit.view): unit for unit in self.all_units() if unit.complete}
        if (split, view) not in units:
            names = ", ".join(map(str, units.values())) or "none"
            raise UsageError(f"{self.path}: expected a complete unit; found no {split}/v{view}; there is {names}")
        units[split, view].check_arrays()
        return zarr.open_group(units[split, view].group, mode="r")


def check_bytes(path: Path, expected: bytes) -> None:
    """Raises: CorruptionError unless the file holds the bytes that follow from cache.json or dataset.json."""
    if not path.is_file() or path.stat().st_size != len(expected) or path.read_bytes() != expected:
        raise CorruptionError(f"{path}: expected the bytes that its request determines; it is missing or changed")


def read_probe(cache: Path) -> npt.NDArray[np.float32]:
    """The teacher's features of the probe pictures, float32 [pictures, N, C].

    Raises: CorruptionError if probe.npy is not the file whose sha256 probe.json holds.
    """
    path, record = cache / "probe.npy", read_record(ProbeRecord, cache / "probe.json")
    if not path.is_file() or file_sha256(path) != record.features_sha256:
        raise CorruptionError(
            f"{path}: expected the sha256 in probe.json; the file is damaged; run `mcm-cache verify --repair`"
        )
    return read_npy(path)


def index_crc32cs(index: npt.NDArray[np.void]) -> tuple[int, ...]:
    """crc32c of every 16 records of an index."""
    starts = range(0, len(index), CHUNK_ROWS)
    return tuple(crc32c(index[start : start + CHUNK_ROWS].tobytes()) for start in starts)
