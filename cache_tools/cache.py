"""CACHE: views and teacher features, read by chunk and checked against the commits.

B rows, N tokens, C channels. docs/format.md describes every byte.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from .chunk import Chunk
from .dataset import CHUNK_ROWS, shard_name
from .errors import CorruptionError, IdentityError, UsageError, found_at
from .quantize import Floats
from .records import decode_record, read_capped, read_record, record_sha256, sha256_hex
from .remote import read_at
from .schema import CacheIdentity, Commit, Manifest, ProbeRecord
from .storage import file_sha256
from .tars import INDEX_DTYPE, VIEW_INDEX_DTYPE, checked_picture, encode_npy, read_npy
from .zarr_shards import array_json, group_json, read_chunk

if TYPE_CHECKING:
    import zarr

# NumPy pads the header to the same size for every number of rows.
_INDEX_HEADER_BYTES = len(encode_npy(np.zeros(0, VIEW_INDEX_DTYPE)))
# How many shards keep their index, mean and std in memory (LRU): 27 MB per 1,024 shards of 1,024
# rows and 768 channels. Chunks are read in random order, so a cache smaller than a view would
# rarely hit. ImageNet has 1,252 shards per view.
MAX_KNOWN = 16_384
_COMMIT, _VIEW = re.compile(r"([0-9]{6,})\.json"), re.compile(r"v(0|[1-9][0-9]{0,8})")


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
        """Return the path of the views of a shard."""
        return self.path / "views" / f"{shard_name(shard)}.tar"

    def index_file(self, shard: int) -> Path:
        """Return the path of the index of a shard's views."""
        return self.path / "views" / f"{shard_name(shard)}.index.npy"

    def commit_file(self, shard: int) -> Path:
        """Return the path of the commit of a shard."""
        return self.path / "commits" / f"{shard_name(shard)}.json"

    @property
    def manifest_file(self) -> Path:
        """The path of the manifest, which exists if the unit is complete."""
        return self.path / "manifest.json"

    def shard_files(self, shard: int) -> dict[str, Path]:
        """Return the path of every file of a shard but its commit: "index", "views" and arrays."""
        arrays = {name: self.group / spec.shard_file(shard) for name, spec in self.specs.items()}
        views = {} if self.identity.pictures is False else {"views": self.tar(shard)}
        return {"index": self.index_file(shard)} | views | arrays

    def shard_rows(self, shard: int) -> int:
        """Return the number of rows of a shard: `rows_per_shard`, or fewer in the last shard."""
        return min(self.identity.rows_per_shard, self.rows - shard * self.identity.rows_per_shard)

    def committed(self) -> list[int]:
        """Return the shards that have a commit, from one listing of the folder."""
        folder = self.path / "commits"
        if not folder.is_dir():
            return []
        found = (_COMMIT.fullmatch(path.name) for path in folder.iterdir())
        return sorted(shard for name in found if name and (shard := int(name[1])) < self.num_shards)

    @property
    def complete(self) -> bool:
        """Whether the manifest exists."""
        return self.manifest_file.is_file()

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, after a check that it belongs to this unit of this cache.

        Raises: CorruptionError if it is damaged; IdentityError if it belongs to another unit.
        """
        return self.decode_manifest(read_capped(self.manifest_file), self.manifest_file)

    def decode_manifest(self, data: bytes, where: str | Path) -> Manifest:
        """Return the manifest in `data`; `where` names its file. The errors are as above."""
        read = decode_record(Manifest, data, where)
        found = (read.identity_sha256, read.split, read.view, read.rows, len(read.commits))
        if found != (self.identity_sha256, self.split, self.view, self.rows, self.num_shards):
            expected = f"expected the manifest of {self} of this cache"
            raise IdentityError(f"{where}: {expected}; found {found}")
        return read

    def commit(self, shard: int, bound: bool = True) -> Commit:
        """Return the commit of a shard, after a check that it belongs to this shard.

        If `bound` is true and the unit is complete, the manifest must also hold its digest.

        Raises: CorruptionError if it is missing or damaged, or if it belongs to another shard.
        """
        path = self.commit_file(shard)
        if not path.is_file():
            raise CorruptionError(f"{path}: expected the commit of a complete unit; it is missing")
        manifest = self.manifest if bound and self.complete else None
        return self.decode_commit(shard, read_capped(path), path, manifest)

    def decode_commit(
        self, shard: int, data: bytes, path: str | Path, manifest: Manifest | None
    ) -> Commit:
        """Return the commit in `data`; `path` names its file. The errors are those of `commit`."""
        commit = decode_record(Commit, data, path)
        found = (commit.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)
        if found != (self.identity_sha256, self.split, self.view, shard, self.shard_rows(shard)):
            expected = f"expected the commit of shard {shard} of {self}"
            raise CorruptionError(f"{path}: {expected}; found that of {found[1:]}")
        chunks, channels = -(-commit.rows // CHUNK_ROWS), self.identity.channels
        by_chunk = {name: spec.chunk_rows == CHUNK_ROWS for name, spec in self.specs.items()}
        lengths = {name: chunks if many else 1 for name, many in by_chunk.items()}
        found_lengths = {name: len(values) for name, values in commit.chunk_crc32c.items()}
        statistics = (len(commit.channel_mean), len(commit.channel_var))
        if found_lengths != lengths | {"index": chunks} or statistics != (channels, channels):
            expected = f"expected {chunks} checksums per array and {channels} statistics"
            raise CorruptionError(f"{path}: {expected}; found {found_lengths} and {statistics}")
        names = {
            file.relative_to(self.path).as_posix() for file in self.shard_files(shard).values()
        }
        if commit.files.keys() != names:
            raise CorruptionError(f"{path}: expected {sorted(names)}; found {sorted(commit.files)}")
        if manifest and record_sha256(commit) != manifest.commits[shard]:
            expected = f"expected the commit that the manifest of {self} names"
            raise CorruptionError(f"{path}: {expected}; found another")
        return commit

    def check_arrays(self) -> None:
        """Compare every zarr.json with the identity. Call it before an array is read.

        Raises: CorruptionError with the path of the file if one differs.
        """
        for path, expected in self.zarr_files().items():
            check_bytes(path, expected)

    def zarr_files(self) -> dict[Path, bytes]:
        """Return the path and the expected bytes of every zarr.json of the unit."""
        arrays = {self.group / name: array_json(spec) for name, spec in self.specs.items()}
        folders = {self.group: group_json(), **arrays}
        return {folder / "zarr.json": data for folder, data in folders.items()}

    @lru_cache(None)  # noqa: B019  a process has few units, and keeps them until it exits
    def _checksums(self, shard: int) -> dict[str, npt.NDArray[np.uint32]]:
        """Return the crc32c of each chunk of a shard.

        The arrays stay in memory: 31 bytes per chunk, of which 16 are data. The commit does not.
        """
        checksums = self.commit(shard).chunk_crc32c.items()
        return {name: np.array(values, np.uint32) for name, values in checksums}

    def stored_index(self, shard: int) -> npt.NDArray[np.void]:
        """Return the index records of the views of a shard, without a check."""
        size = self.shard_rows(shard) * VIEW_INDEX_DTYPE.itemsize
        data = read_at(self.index_file(shard), _INDEX_HEADER_BYTES, size)
        return np.frombuffer(data, VIEW_INDEX_DTYPE)

    def index(self, shard: int) -> npt.NDArray[np.void]:
        """Return the index records of the views of a shard.

        Raises: CorruptionError if their crc32c differs from the commit.
        """
        index = self.stored_index(shard)
        if index_crc32cs(index) != tuple(self._checksums(shard)["index"]):
            expected = f"{self.index_file(shard)}: expected the crc32c that the commit records"
            raise CorruptionError(f"{expected}; found another; run `mcm-cache verify`")
        return index

    @lru_cache(MAX_KNOWN)  # noqa: B019
    def _constants(self, shard: int) -> tuple[npt.NDArray[np.void], Floats | None, Floats | None]:
        """Return the index without the geometry, and the mean and std [C] of a shard."""
        records = self.index(shard)[list(INDEX_DTYPE.names or ())].astype(INDEX_DTYPE)
        mean, std = (self._array(name, shard, 0, 1) for name in ("channel_mean", "channel_std"))
        return records, None if mean is None else mean[0], None if std is None else std[0]

    def chunk(self, chunk: int, into: Mapping[str, npt.NDArray[Any]] | None = None) -> Chunk:
        """Return rows 16 * chunk to 16 * chunk + 15, checked against the commit.

        `into` may hold arrays of 16 rows for `patch`, `scale` and `cls`. A chunk of 16 rows is read
        into these arrays. If `into` is given without `cls`, `cls` is not read.

        Raises: IndexError for a number outside the unit; CorruptionError with the path of the file.
        """
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"{self}: expected a chunk below {self.num_chunks}; found {chunk}")
        shard, position = divmod(chunk, self.chunks_per_shard)
        row0 = chunk * CHUNK_ROWS
        rows = min(CHUNK_ROWS, self.rows - row0)
        records, mean, std = self._constants(shard)
        index: Any = records[position * CHUNK_ROWS :][:rows]
        pictures = [] if self.identity.pictures is False else self._pictures(shard, row0, index)
        whole = into if into and rows == CHUNK_ROWS else {}
        codes = self._array("patch", shard, position, rows, whole.get("patch"))
        scale = self._array("scale", shard, position, rows, whole.get("scale"))
        skip_cls = into and "cls" not in into
        cls = None if skip_cls else self._array("cls", shard, position, rows, whole.get("cls"))
        assert codes is not None
        labels = index["label"].astype(np.int32)
        size_HW = self.identity.view_height, self.identity.view_width
        return Chunk(row0, size_HW, pictures, labels, codes, scale, mean, std, cls)

    def _pictures(self, shard: int, row0: int, index: Any) -> list[memoryview]:
        """Return the checked pictures of a chunk, which are adjacent in the tar, by one read."""
        start, tar = int(index["offset"][0]), self.tar(shard)
        end = int(index["offset"][-1]) + int(index["size"][-1])
        data = memoryview(read_at(tar, start, end - start))
        columns = (index["offset"] - start, index["size"], index["crc32c"])
        spans = zip(*(column.tolist() for column in columns), strict=True)
        return [
            checked_picture(tar, data[offset : offset + size], checksum, row0 + i)
            for i, (offset, size, checksum) in enumerate(spans)
        ]

    def __iter__(self) -> Iterator[Chunk]:
        """Yield every chunk in the order of its rows."""
        return map(self.chunk, range(self.num_chunks))

    def _array(
        self, name: str, shard: int, position: int, rows: int, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any] | None:
        if name not in self.specs:
            return None
        expected = int(self._checksums(shard)[name][position])
        return read_chunk(self.group, self.specs[name], shard, position, expected, out)[:rows]

    def channel_stats(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the mean and std [C] of the features of all rows, from the commits."""
        commits = map(self.commit, range(self.num_shards))  # one at a time: each takes 67 KB
        found = [(c.rows, np.array(c.channel_mean), np.array(c.channel_var)) for c in commits]
        weights, means, variances = map(np.array, zip(*found, strict=True))
        mean = np.average(means, axis=0, weights=weights)
        return mean, np.sqrt(np.average(variances + (means - mean) ** 2, axis=0, weights=weights))


class Cache:
    """A CACHE folder opened for reading.

    Raises: UsageError if the folder is not a CACHE; CorruptionError if cache.json is damaged;
    IdentityError if it has another format version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        if not (path / "cache.json").is_file():
            found = f"found {found_at(path)}; make one with `mcm-cache extract`"
            raise UsageError(f"{path}: expected a CACHE (cache.json); {found}")
        self.identity = read_record(CacheIdentity, path / "cache.json")
        self.sha256 = record_sha256(self.identity)

    def units(self, split: str) -> list[Unit]:
        """Return the units of a split that have a folder, in the order of their views."""
        found = (_VIEW.fullmatch(path.name) for path in (self.path / split).glob("v*"))
        views = sorted(int(name[1]) for name in found if name)
        return [Unit(self.path, self.identity, split, view) for view in views]

    def all_units(self) -> list[Unit]:
        """Return the units of every split."""
        return [unit for split in self.identity.rows for unit in self.units(split)]

    def projection(self) -> npt.NDArray[np.float32]:
        """Return the teacher's projection from C channels to the joint space, float32 [C, E].

        Raises: UsageError if the teacher has no projection; CorruptionError if the file is damaged.
        """
        path, expected = self.path / "projection.npy", self.identity.teacher.projection_sha256
        if expected is None:
            found = f"{self.identity.teacher.name} has none"
            raise UsageError(f"{self.path}: expected a teacher with a projection; {found}")
        matrix = read_npy(path)
        # The digest covers the values only: another byte order or trailing bytes would pass it.
        canonical = encode_npy(matrix.astype("<f4")) == path.read_bytes()
        if not canonical or sha256_hex(matrix.tobytes()) != expected:
            raise CorruptionError(f"{path}: expected the sha256 in cache.json; found another")
        return np.array(matrix, np.float32)

    def check_pictures(self) -> None:
        """Raise UsageError if this CACHE was pulled without its pictures."""
        if self.identity.pictures is False:
            serves = "`mcm-train probe` and Cache.zarr() read it; pull without --features-only"
            raise UsageError(f"{self.path}: expected views; found features only; {serves} to train")

    def complete_units(self, split: str) -> list[Unit]:
        """Return the units of a split that have a manifest: training uses only these."""
        return [unit for unit in self.units(split) if unit.complete]

    def unit(self, split: str, view: int = 0) -> Unit:
        """Return a complete unit. Iterating over it yields its chunks.

        Raises: UsageError with the names of the complete units if there is no such unit;
        CorruptionError if a zarr.json differs from the identity.
        """
        units = {(unit.split, unit.view): unit for unit in self.all_units() if unit.complete}
        if (split, view) not in units:
            names = ", ".join(map(str, units.values())) or "none"
            found = f"found no {split}/v{view}; there is {names}"
            raise UsageError(f"{self.path}: expected a complete unit; {found}")
        units[split, view].check_arrays()
        return units[split, view]

    def zarr(self, split: str, view: int = 0) -> "zarr.Group":
        """Return the arrays of a complete unit, as a read-only group of zarr-python.

        docs/format.md describes how codes are decoded. zarr-python reads a missing shard as fill
        values; `Unit.chunk` raises. The errors are those of `unit`.
        """
        import zarr  # takes 0.6 s

        return zarr.open_group(self.unit(split, view).group, mode="r")


def check_bytes(path: Path, expected: bytes) -> None:
    """Raise CorruptionError unless the file at `path` holds the bytes `expected`."""
    if not path.is_file() or path.stat().st_size != len(expected) or path.read_bytes() != expected:
        implied = "expected the bytes that cache.json or dataset.json implies"
        raise CorruptionError(f"{path}: {implied}; it is missing or changed")


def read_probe(cache: Path) -> npt.NDArray[np.float32]:
    """Return the teacher's features of the probe pictures, float32 [pictures, N, C].

    Raises: CorruptionError if the sha256 of probe.npy differs from probe.json.
    """
    path, record = cache / "probe.npy", read_record(ProbeRecord, cache / "probe.json")
    if not path.is_file() or file_sha256(path) != record.features_sha256:
        found = "the file is damaged; run `mcm-cache verify --repair`"
        raise CorruptionError(f"{path}: expected the sha256 in probe.json; {found}")
    return read_npy(path)


def index_crc32cs(index: npt.NDArray[np.void]) -> tuple[int, ...]:
    """Return one crc32c per 16 records of an index."""
    starts = range(0, len(index), CHUNK_ROWS)
    return tuple(crc32c(index[start : start + CHUNK_ROWS].tobytes()) for start in starts)
