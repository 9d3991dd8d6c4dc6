"""`mcm-cache verify`: check a DATASET or CACHE against its records and report each damaged file.

A full check decodes the records, checks that they refer to each other, and compares the size and
the sha256 of every committed file. In a file with another sha256, the crc32c of each chunk or
picture locates the damage. A quick check compares records and sizes only.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .cache import Cache, Unit, check_bytes, index_crc32cs, read_probe
from .console import progress
from .dataset import Dataset, info_json
from .errors import CorruptionError, IdentityError, UsageError, found_at
from .records import FileEntry
from .rng import hash_u64
from .schema import Commit
from .storage import file_sha256
from .tars import read_picture
from .zarr_shards import read_chunk

MAX_NAMED = 8  # maximum number of damaged parts per message
# Errors of the operating system that mean a damaged file.
_DAMAGE = (errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Problem:
    """A damaged file. `what` is its kind; `unit` is a name such as "train/v0".

    If `shard` is set, only this shard is damaged.
    """

    text: str
    file: str
    what: str
    split: str | None = None
    unit: str | None = None
    shard: int | None = None


@dataclass
class Report:
    """The result of a check: `shards` of `of` shards were checked, with these problems."""

    path: str
    quick: bool = False
    shards: int = 0
    of: int = 0
    files: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    @contextmanager
    def file(self, path: Path, what: str, *place: str | int | None) -> Iterator[None]:
        """Count `path` as checked. If the block raises, record a problem and continue.

        `place` is the split, unit and shard of the file.
        """
        try:
            yield
        except (CorruptionError, IdentityError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise
            problem = Problem(str(error), str(path), what, *place)  # type: ignore[arg-type]
            self.problems.append(problem)
        else:
            self.files += 1

    def add(self, shard: "Report") -> None:
        """Add the report of a shard."""
        self.files, self.rows = self.files + shard.files, self.rows + shard.rows
        self.problems += shard.problems


class _Shards(NamedTuple):
    """The shards of a unit or a split, which are checked independently and in any order."""

    name: str
    shards: Sequence[int]
    check: Callable[[int], Report]

    def drawn(self, share: float, seed: int) -> list[int]:
        """Return a `share` of the shards, at least one.

        The shards with the smallest hashes are drawn, so a larger share contains a smaller share.
        """
        hashes = hash_u64(seed, f"verify/{self.name}", np.array(self.shards, np.int64))
        order = np.argsort(hashes, kind="stable")
        return sorted(self.shards[i] for i in order[: max(1, round(share * len(order)))])


def verify(
    path: Path, quick: bool = False, share: float = 1.0, seed: int = 0, quiet: bool = False
) -> Report:
    """Check a `share` of the shards, drawn by `seed`, and return a report of the damage.

    Raises: UsageError if `path` is neither a DATASET nor a CACHE; IdentityError if it has another
    format version.
    """
    if not 0 < share <= 1:
        raise UsageError(
            f"--subset: expected more than 0% and at most 100%; found {100 * share:g}%"
        )
    report = Report(str(path), quick)
    groups = _shard_groups(path, report)
    checks = [partial(group.check, shard) for group in groups for shard in group.drawn(share, seed)]
    report.shards, report.of = len(checks), sum(len(group.shards) for group in groups)
    # Threads overlap reads and sha256. A quick check runs Python code only, so it uses one thread.
    threads = 1 if quick else min(8, len(os.sched_getaffinity(0)))
    total, title = len(checks), f"verify {path}"
    with progress(total, title, "shards", quiet=quiet) as bar, ThreadPoolExecutor(threads) as pool:
        for shard_report in (pool.map if threads > 1 else map)(lambda check: check(), checks):
            report.add(shard_report)
            bar.update(1)
    return report


def _shard_groups(path: Path, report: Report) -> list[_Shards]:
    """Check the files of `path` that do not belong to a shard, and return its shards."""
    for name, list_groups in (("cache.json", _cache_groups), ("dataset.json", _dataset_groups)):
        record = path / name
        if record.is_file():
            try:
                return list_groups(path, report)
            except CorruptionError as error:  # this record describes the other files
                report.problems.append(Problem(str(error), str(record), record.name))
                return []
    expected = "expected a DATASET (dataset.json) or a CACHE (cache.json)"
    raise UsageError(f"{path}: {expected}; found {found_at(path)}")


def _dataset_groups(path: Path, report: Report) -> list[_Shards]:
    dataset, groups = Dataset(path), []
    for split, entry in dataset.record.splits.items():
        info = path / split / "_info.json"
        if info.is_file():  # `shard` writes a missing one
            with report.file(info, "_info.json", split):
                check_bytes(info, info_json(split, entry))
        check = partial(_check_dataset_shard, dataset, report.quick, split)
        groups.append(_Shards(split, range(len(entry.shards)), check))
    return groups


def _check_dataset_shard(dataset: Dataset, quick: bool, split: str, shard: int) -> Report:
    report, place = Report(""), (split, None, shard)
    damaged: Iterable[str] = ()
    tar, entry = dataset.tar(split, shard), dataset.split(split).shards[shard]
    row0 = shard * dataset.record.rows_per_shard
    with report.file(tar.with_suffix(".index.npy"), "index", *place):
        damaged = _damaged_rows(tar, dataset.index(split, shard), row0)
    if entry.targets_sha256:
        with report.file(tar.with_suffix(".targets.npy"), "targets", *place):
            what = "mask of row" if dataset.record.task == "segment" else "boxes of row"
            damaged = chain(damaged, _damaged_rows(tar, dataset.targets(split, shard), row0, what))
    with report.file(tar, "tar", *place):
        _check_file(tar, FileEntry(bytes=entry.tar_bytes, sha256=entry.tar_sha256), quick, damaged)
    report.rows = 0 if quick or report.problems else entry.rows
    return report


def _cache_groups(path: Path, report: Report) -> list[_Shards]:
    cache, groups = Cache(path), []
    if cache.identity.teacher.projection_sha256:
        with report.file(path / "projection.npy", "projection"):
            cache.projection()
    if (path / "probe.json").is_file():  # `extract` writes a missing one
        with report.file(path / "probe.npy", "probe"):
            read_probe(path)
    for unit in cache.all_units():
        bound = False  # whether a valid manifest lists the commits
        if unit.complete:
            with report.file(unit.manifest_file, "manifest", unit.split, str(unit)):
                bound = bool(unit.manifest)
        for file, data in unit.zarr_files().items():
            if bound or file.exists():  # in an unfinished unit, `extract` writes a missing one
                with report.file(file, "zarr.json", unit.split, str(unit)):
                    check_bytes(file, data)
        shards = range(unit.num_shards) if bound else unit.committed()
        groups.append(_Shards(str(unit), shards, partial(_check_shard, unit, bound, report.quick)))
    return groups


def _check_shard(unit: Unit, bound: bool, quick: bool, shard: int) -> Report:
    report, place = Report(""), (unit.split, str(unit), shard)
    with report.file(unit.commit_file(shard), "commit", *place):
        commit = unit.commit(shard, bound)
    if not report.problems:
        for what, path in unit.shard_files(shard).items():
            with report.file(path, what, *place):
                entry = commit.files[path.relative_to(unit.path).as_posix()]
                _check_file(path, entry, quick, _damaged(unit, commit, what))
        report.rows = 0 if quick or report.problems else commit.rows
    return report


def _damaged(unit: Unit, commit: Commit, what: str) -> Iterator[str]:
    """Yield the chunks of an array or an index, or the rows of a tar, whose crc32c differs."""
    shard = commit.shard
    if what == "views":
        with suppress(CorruptionError):  # a damaged index is reported separately
            row0 = shard * unit.identity.rows_per_shard
            yield from _damaged_rows(unit.tar(shard), unit.index(shard), row0)
        return
    checksums = commit.chunk_crc32c[what]
    if what == "index":
        stored = index_crc32cs(unit.stored_index(shard))
        differ = [crc32c != expected for crc32c, expected in zip(stored, checksums, strict=True)]
    else:
        read = partial(read_chunk, unit.group, unit.specs[what], shard)
        differ = [_fails(read, position, crc32c) for position, crc32c in enumerate(checksums)]
    yield from (f"chunk {position}" for position, differs in enumerate(differ) if differs)


def _damaged_rows(
    tar: Path, index: npt.NDArray[np.void], row0: int, what: str = "row"
) -> Iterator[str]:
    rows = enumerate(index, row0)
    return (f"{what} {row}" for row, entry in rows if _fails(read_picture, tar, entry, row))


def _fails(read: Callable[..., object], *arguments: object) -> bool:
    try:
        read(*arguments)
    except CorruptionError:
        return True
    return False


def _check_file(path: Path, entry: FileEntry, quick: bool, parts: Iterable[str]) -> None:
    """Check the size of a file and, unless `quick`, its sha256.

    Raises: CorruptionError with the path and the damaged `parts`, which are computed only then.
    """
    size = path.stat().st_size if path.is_file() else "no file"
    if size != entry.bytes:
        raise CorruptionError(f"{path}: expected {entry.bytes} bytes; found {size}")
    if not quick and file_sha256(path) != entry.sha256:
        damaged = list(parts)
        more = f" and {len(damaged) - MAX_NAMED} more" if len(damaged) > MAX_NAMED else ""
        where = ", ".join(damaged[:MAX_NAMED]) + more or "not located"
        found = f"found another; damaged parts: {where}"
        raise CorruptionError(f"{path}: expected the recorded sha256; {found}")
