"""Writing a CACHE: one shard of one unit at a time, committed whole or absent."""

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
from .records import differences, encode_record, read_record, record_sha256, sha256_hex
from .schema import CacheIdentity, Commit, Fidelity, FileEntry, Fingerprint, Manifest
from .storage import publish, remove, write_atomic
from .tars import VIEW_INDEX_DTYPE, encode_npy, tar_writer
from .zarr_shards import shard_writer


@contextmanager
def unit_writer(unit: Unit, shard: int) -> Iterator["UnitShardWriter"]:
    """Write one shard of one unit; it is committed whole by `commit`, or absent.

    Opening removes the commit (and the manifest) first: from there to `commit`, the shard does not count.
    """
    remove(unit.manifest_file)
    remove(unit.commit_file(shard))
    _publish_arrays(unit)
    with ExitStack() as stack:
        yield UnitShardWriter(unit, shard, stack)


class UnitShardWriter:
    """What `unit_writer` yields: the open files of one shard of one unit."""

    def __init__(self, unit: Unit, shard: int, stack: ExitStack) -> None:
        self.unit, self.shard, self._stack = unit, shard, stack
        self._tar = stack.enter_context(tar_writer(unit.tar(shard)))
        specs = unit.specs.items()
        self._arrays = {name: stack.enter_context(shard_writer(unit.group, spec, shard)) for name, spec in specs}
        self._index = np.zeros(unit.shard_rows(shard), VIEW_INDEX_DTYPE)
        self._views = 0

    def add_view(self, data: bytes, label: int, geometry: Sequence[int]) -> None:
        """Append the next row's view; geometry is (top, left, height, width, flip, source_height, source_width)."""
        key = row_key(self.shard * self.unit.identity.rows_per_shard + self._views)
        extension = picture_extension(data)
        place = self._tar.add(key, {extension: data, "cls": str(label).encode()}, picture=extension)
        self._index[self._views] = (*place, label, *geometry)
        self._views += 1

    def add(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Append rows to an array, whole chunks but for the last call."""
        for start in range(0, len(rows), self.unit.specs[name].chunk_rows):
            self._arrays[name].append(rows[start : start + self.unit.specs[name].chunk_rows])

    def commit(
        self,
        channel_mean: npt.NDArray[np.float64],
        channel_var: npt.NDArray[np.float64],
        fidelity: Fidelity,
        fingerprint: Fingerprint,
    ) -> None:
        """Close and fsync every file, then write the commit that vouches for them."""
        unit = self.unit
        assert self._views == len(self._index), f"{self._views} views of {len(self._index)}"
        self._stack.close()
        index = encode_npy(self._index)
        write_atomic(unit.index_file(self.shard), index)
        written = {unit.group / unit.specs[name].shard_file(self.shard): a.file for name, a in self._arrays.items()}
        written[unit.tar(self.shard)] = self._tar.file
        entries = {path: FileEntry(bytes=file.bytes, sha256=file.sha256) for path, file in written.items()}
        entries[unit.index_file(self.shard)] = FileEntry(bytes=len(index), sha256=sha256_hex(index))
        crc32cs = {name: tuple(array.crc32cs) for name, array in self._arrays.items()}
        crc32cs["index"] = index_crc32cs(self._index)
        record = Commit(
            identity_sha256=unit.identity_sha256,
            split=unit.split,
            view=unit.view,
            shard=self.shard,
            rows=len(self._index),
            files={path.relative_to(unit.path).as_posix(): entry for path, entry in entries.items()},
            chunk_crc32c=crc32cs,
            channel_mean=tuple(float(f"{value:.7g}") for value in channel_mean),
            channel_var=tuple(float(f"{value:.7g}") for value in channel_var),
            fidelity=fidelity,
            fingerprint=fingerprint,
        )
        write_atomic(unit.commit_file(self.shard), encode_record(record))


def publish_identity(cache: Path, identity: CacheIdentity) -> None:
    """Write cache.json, or compare with the one that is there; where it was lost, with a commit.

    Raises: IdentityError with the fields that differ.
    """
    path = cache / "cache.json"
    if path.is_file():
        found = differences(identity, read_record(CacheIdentity, path))
        if found:
            raise IdentityError(f"{cache}: this request is not the cache's (asked != found): {'; '.join(found)}")
    elif commit := next(cache.glob("*/v*/commits/*.json"), None):
        if read_record(Commit, commit).identity_sha256 != record_sha256(identity):
            raise IdentityError(f"{cache}: expected the request that its commits, such as {commit}, were made by")
    publish(path, encode_record(identity))


def _publish_arrays(unit: Unit) -> None:
    for path, data in unit.zarr_files().items():
        publish(path, data)


def finish_unit(unit: Unit) -> bool:
    """Write the manifest when every shard has its commit; says whether the unit is complete."""
    if not unit.complete and len(unit.committed()) == unit.num_shards:
        _publish_arrays(unit)  # again: `verify --repair` may have moved some away
        shas = tuple(record_sha256(unit.commit(shard)) for shard in range(unit.num_shards))
        manifest = Manifest(
            identity_sha256=unit.identity_sha256, split=unit.split, view=unit.view, rows=unit.rows, commits=shas
        )
        publish(unit.manifest_file, encode_record(manifest))
    return unit.complete
