"""Write a CACHE, one shard of one unit at a time. A shard is committed whole or absent."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cache import Unit, index_crc32cs
from .dataset import row_key
from .errors import IdentityError
from .images import picture_extension
from .records import FileEntry, differences, encode_record, read_record, record_sha256, sha256_hex
from .schema import CacheIdentity, Commit, Fidelity, Fingerprint, Manifest
from .storage import publish, remove, work_dir, write_atomic
from .tars import VIEW_INDEX_DTYPE, encode_npy, tar_writer
from .zarr_shards import shard_writer


def shard_lock(cache: Path, split: str, shard: int) -> Path:
    """Return the path of the lock that covers all views of one shard.

    A process holds this lock while it writes or moves the shard.
    """
    return work_dir(cache) / "locks" / f"{split}-{shard:06d}"


@contextmanager
def unit_writer(unit: Unit, shard: int) -> Iterator["UnitShardWriter"]:
    """Open the files of one shard of one unit, which has no commit, for writing.

    The manifest is removed first. The shard is absent until `UnitShardWriter.commit` returns.
    """
    remove(unit.manifest_file)
    _publish_arrays(unit)
    with ExitStack() as stack:
        yield UnitShardWriter(unit, shard, stack)


class UnitShardWriter:
    """The open files of one shard of one unit. `unit_writer` yields it."""

    def __init__(self, unit: Unit, shard: int, stack: ExitStack) -> None:
        self.unit, self.shard, self._stack = unit, shard, stack
        self._tar = stack.enter_context(tar_writer(unit.tar(shard)))
        writers = {name: shard_writer(unit.group, spec, shard) for name, spec in unit.specs.items()}
        self._arrays = {name: stack.enter_context(writer) for name, writer in writers.items()}
        self._index = np.zeros(unit.shard_rows(shard), VIEW_INDEX_DTYPE)
        self._views = 0

    def add_view(self, data: bytes, label: int, geometry: Sequence[int]) -> None:
        """Append the view of the next row.

        `geometry` is (top, left, height, width, flip, source_height, source_width).
        """
        key = row_key(self.shard * self.unit.identity.rows_per_shard + self._views)
        extension = picture_extension(data)
        place = self._tar.add(key, {extension: data, "cls": str(label).encode()}, indexed=extension)
        self._index[self._views] = (*place, label, *geometry)
        self._views += 1

    def add(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Append rows to an array. Every call but the last must give whole chunks."""
        for start in range(0, len(rows), self.unit.specs[name].chunk_rows):
            self._arrays[name].append(rows[start : start + self.unit.specs[name].chunk_rows])

    def commit(
        self,
        channel_mean: npt.NDArray[np.float64],
        channel_var: npt.NDArray[np.float64],
        fidelity: Fidelity,
        fingerprint: Fingerprint,
    ) -> None:
        """Close and fsync every file, then write the commit with their sizes and digests.

        If another worker has committed the shard meanwhile, its commit stays.

        Raises: IdentityError if the other worker has written other bytes.
        """
        unit = self.unit
        assert self._views == len(self._index), f"{self._views} views of {len(self._index)}"
        self._stack.close()
        index = encode_npy(self._index)
        write_atomic(unit.index_file(self.shard), index)
        names = {name: unit.specs[name].shard_file(self.shard) for name in self._arrays}
        files = {unit.group / names[name]: array.file for name, array in self._arrays.items()}
        files[unit.tar(self.shard)] = self._tar.file
        entries = {path: FileEntry(bytes=f.bytes, sha256=f.sha256) for path, f in files.items()}
        index_entry = FileEntry(bytes=len(index), sha256=sha256_hex(index))
        entries[unit.index_file(self.shard)] = index_entry
        crc32cs = {name: tuple(array.crc32cs) for name, array in self._arrays.items()}
        crc32cs["index"] = index_crc32cs(self._index)
        record = Commit(
            identity_sha256=unit.identity_sha256,
            split=unit.split,
            view=unit.view,
            shard=self.shard,
            rows=len(self._index),
            files={path.relative_to(unit.path).as_posix(): one for path, one in entries.items()},
            chunk_crc32c=crc32cs,
            channel_mean=tuple(float(f"{value:.7g}") for value in channel_mean),
            channel_var=tuple(float(f"{value:.7g}") for value in channel_var),
            fidelity=fidelity,
            fingerprint=fingerprint,
        )
        publish(unit.commit_file(self.shard), encode_record(record), compare=False)
        if unit.commit(self.shard, bound=False).files != record.files:
            expected = f"{unit.commit_file(self.shard)}: expected the digests of this worker"
            found = "another worker committed others, which stay; run workers of one kind"
            raise IdentityError(f"{expected}; {found}")


def publish_identity(cache: Path, identity: CacheIdentity) -> None:
    """Write cache.json, or compare `identity` with the existing one.

    If cache.json is lost, `identity` is compared with a commit.

    Raises: IdentityError with the fields that differ.
    """
    path = cache / "cache.json"
    if path.is_file():
        found = differences(identity, read_record(CacheIdentity, path))
        if found:
            expected = "expected the request that made this cache (asked != found)"
            raise IdentityError(f"{cache}: {expected}: {'; '.join(found)}")
    elif commit := next(cache.glob("*/v*/commits/*.json"), None):
        if read_record(Commit, commit).identity_sha256 != record_sha256(identity):
            expected = f"expected the request that made its commits, such as {commit}"
            raise IdentityError(f"{cache}: {expected}; found another; use the original request")
    publish(path, encode_record(identity))


def _publish_arrays(unit: Unit) -> None:
    for path, data in unit.zarr_files().items():
        publish(path, data)


def finish_unit(unit: Unit) -> bool:
    """Write the manifest if every shard has a commit. Return whether the unit is complete."""
    if not unit.complete and len(unit.committed()) == unit.num_shards:
        _publish_arrays(unit)  # `verify --repair` may have moved some of the files
        digests = [record_sha256(unit.commit(shard)) for shard in range(unit.num_shards)]
        publish(unit.manifest_file, manifest_json(unit, digests))
    return unit.complete


def manifest_json(unit: Unit, digests: Sequence[str]) -> bytes:
    """Return the manifest of a unit whose commits have these sha256, in order."""
    record = Manifest(
        identity_sha256=unit.identity_sha256,
        split=unit.split,
        view=unit.view,
        rows=unit.rows,
        commits=tuple(digests),
    )
    return encode_record(record)
