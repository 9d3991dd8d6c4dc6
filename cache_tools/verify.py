"""`mcm-cache verify`: every committed byte of a DATASET or CACHE against its checksums; what is wrong, by file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from .cache import Cache, Unit
from .console import progress
from .dataset import CHUNK_ROWS, Dataset
from .errors import CorruptionError, McmError, UsageError
from .records import sha256_hex
from .storage import file_sha256
from .tars import read_npy


@dataclass
class Report:
    """What was checked and what is wrong: one line a problem, naming the file."""

    path: str
    level: str
    files: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)


def verify(path: Path, full: bool = False, quiet: bool = False) -> Report:
    """Check sizes, records and crc32c of every picture and chunk; `full` adds sha256 of files and finiteness.

    Raises: UsageError when the folder is neither; damage is reported, not raised.
    """
    report = Report(str(path), "full" if full else "default")
    if (path / "cache.json").is_file():
        steps = _cache_steps(Cache(path), full, report)
    elif (path / "dataset.json").is_file():
        steps = _dataset_steps(Dataset(path), full, report)
    else:
        raise UsageError(f"{path}: expected a DATASET (dataset.json) or a CACHE (cache.json)")
    checks = list(steps)
    with progress(len(checks), f"verify {path}", "shards", quiet=quiet) as bar:
        for check in checks:
            try:
                check()
            except (McmError, OSError) as error:
                report.problems.append(str(error))
            bar.update(1)
    return report


def _dataset_steps(dataset: Dataset, full: bool, report: Report) -> Iterator[Callable[[], None]]:
    for name, split in dataset.record.splits.items():
        for shard in range(len(split.shards)):
            yield partial(_check_tar, dataset, name, shard, full, report)


def _check_tar(dataset: Dataset, split: str, shard: int, full: bool, report: Report) -> None:
    tar, entry = dataset.tar(split, shard), dataset.split(split).shards[shard]
    report.files += 2
    first = shard * dataset.record.rows_per_shard
    for row in range(first, first + entry.rows):
        dataset.picture(split, row)
        report.rows += 1
    if tar.stat().st_size != entry.tar_bytes or (full and file_sha256(tar) != entry.tar_sha256):
        raise CorruptionError(f"{tar}: its size or sha256 is not what dataset.json says")


def _cache_steps(cache: Cache, full: bool, report: Report) -> Iterator[Callable[[], None]]:
    yield partial(_check_projection, cache)
    for unit in cache.all_units():
        yield unit.check_arrays
        for shard in range(unit.num_shards) if unit.complete else unit.committed():
            yield partial(_check_shard, unit, shard, full, report)


def _check_projection(cache: Cache) -> None:
    expected, path = cache.identity.teacher.projection_sha256, cache.path / "projection.npy"
    if expected and sha256_hex(read_npy(path).tobytes()) != expected:
        raise CorruptionError(f"{path}: its sha256 is not what cache.json says")


def _check_shard(unit: Unit, shard: int, full: bool, report: Report) -> None:
    commit = unit.commit(shard)
    for name, entry in commit.files.items():
        path = unit.path / name
        found = path.stat().st_size if path.is_file() else None
        if found != entry.bytes:
            raise CorruptionError(f"{path}: expected {entry.bytes} bytes; found {found or 'nothing'}")
    report.files += len(commit.files) + 1
    first = shard * unit.chunks_per_shard
    for chunk in range(first, first + -(-commit.rows // CHUNK_ROWS)):
        read = unit.chunk(chunk)
        report.rows += read.rows
        if full and not np.isfinite(read.features()).all():
            report.problems.append(f"{unit.group}: rows {read.row0}+: features are not finite")
    if full:
        for name, entry in commit.files.items():
            if file_sha256(unit.path / name) != entry.sha256:
                report.problems.append(f"{unit.path / name}: its sha256 is not the commit's")
