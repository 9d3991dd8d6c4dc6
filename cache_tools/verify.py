"""`mcm-cache verify`: a DATASET or CACHE against its records; what is wrong, by file, so that `repair` can move it.

quick: records decode and are bound to each other, files are there with their sizes. default: also the crc32c of every
picture, index record and chunk. full: also the sha256 of every file from that same read (compressed chunks that are
looked into are read twice), the tar's members against the index, sizes of views, finiteness, and that the error of
quantisation is no larger than the scales allow.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .cache import Cache, Unit
from .console import progress
from .dataset import Dataset, info_json
from .draws import hash_u64
from .errors import CorruptionError, IdentityError, UsageError
from .file_checks import check_array, check_size, check_tar, check_view_index
from .identity import Commit, FileEntry
from .quantize import decode
from .records import read_capped
from .tars import read_sealed_npy

# The error recomputed from the scales against the measured one: within 0.14 % for DeiT-tiny on 250 photographs,
# shards of 64 rows; fewer values add chance: 5 standard errors of the square of a uniform variable.
MSE_TOLERANCE = 0.02
_DAMAGE = (errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)  # others say nothing about the bytes


@dataclass(frozen=True)
class Problem:
    """A damaged file: `what` is its kind, `unit` such as "train/v0"; with a `shard`, no other shard is spoilt by it."""

    text: str
    file: str
    what: str
    split: str | None = None
    unit: str | None = None
    shard: int | None = None


@dataclass
class Found:
    """What was checked of a place (all of it, a unit, a shard) and what is wrong there."""

    split: str | None = None
    unit: str | None = None
    shard: int | None = None
    files: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    @contextmanager
    def file(self, path: Path, what: str) -> Iterator[None]:
        """Count `path` as checked, or note as its problem what is raised inside: a damaged file hides no other."""
        try:
            yield
        except (CorruptionError, IdentityError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise
            self.problems.append(Problem(str(error), str(path), what, self.split, self.unit, self.shard))
        else:
            self.files += 1


@dataclass
class Report:
    """What was checked, in `shards` of `of` shards, and what is wrong."""

    path: str
    level: str
    shards: int = 0
    of: int = 0
    files: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """Take up what was found in a place."""
        self.files, self.rows = self.files + found.files, self.rows + found.rows
        self.problems += found.problems


class _Part(NamedTuple):
    """A unit or a split: shards that can be checked each by itself, in any order."""

    name: str
    shards: Sequence[int]
    check: Callable[[int], Found]

    def drawn(self, share: float, seed: int) -> list[int]:
        """`share` of the shards, at least one: those of the smallest hashes, so that a larger share holds a smaller."""
        order = np.argsort(hash_u64(seed, f"verify/{self.name}", np.array(self.shards, np.int64)), kind="stable")
        return sorted(self.shards[i] for i in order[: max(1, round(share * len(order)))])


def verify(
    path: Path,
    full: bool = False,
    quick: bool = False,
    share: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    quiet: bool = False,
) -> Report:
    """Check a `share` of the shards, drawn by `seed`; damage is reported, not raised.

    Raises: UsageError when the folder is neither; IdentityError for another format version.
    """
    if (full and quick) or not 0 < share <= 1:
        raise UsageError("expected --quick or --full, not both, and a --subset above 0% and up to 100%")
    report = Report(str(path), "full" if full else "quick" if quick else "default")
    parts = list(_parts(path, report))
    steps = [(part.check, shard) for part in parts for shard in part.drawn(share, seed)]
    report.shards, report.of = len(steps), sum(len(part.shards) for part in parts)
    # A quick check is Python alone, which threads do not speed up; reads, sha256 and crc32c of several shards overlap.
    threads = 1 if quick else threads or min(8, len(os.sched_getaffinity(0)))
    with progress(len(steps), f"verify {path}", "shards", quiet=quiet) as bar, ThreadPoolExecutor(threads) as pool:
        for found in (pool.map if threads > 1 else map)(lambda step: step[0](step[1]), steps):
            report.add(found)
            bar.update(1)
    return report


def _parts(path: Path, report: Report) -> list[_Part]:
    """What `path` consists of; what is no shard's is checked on the way."""
    for record, kind in ((path / "cache.json", _cache_parts), (path / "dataset.json", _dataset_parts)):
        if record.is_file():
            try:
                return kind(path, report)
            except CorruptionError as error:  # without it there is nothing to compare the rest with
                report.problems.append(Problem(str(error), str(record), record.name))
                return []
    raise UsageError(f"{path}: expected a DATASET (dataset.json) or a CACHE (cache.json)")


def _dataset_parts(path: Path, report: Report) -> list[_Part]:
    dataset = Dataset(path)
    shards = {split: range(len(entry.shards)) for split, entry in dataset.record.splits.items()}
    for split, entry in dataset.record.splits.items():
        found, info = Found(split), path / split / "_info.json"
        if info.is_file():  # where it is missing, `shard` writes it
            with found.file(info, "_info.json"):
                if read_capped(info) != info_json(split, entry):
                    raise CorruptionError(f"{info}: expected the list of tars that dataset.json tells; found another")
        report.add(found)
    return [_Part(name, shards[name], partial(_check_dataset_shard, dataset, name, report.level)) for name in shards]


def _check_dataset_shard(dataset: Dataset, split: str, level: str, shard: int) -> Found:
    found = Found(split, None, shard)
    tar, entry = dataset.tar(split, shard), dataset.split(split).shards[shard]
    index: npt.NDArray[np.void] | None = None
    with found.file(tar.with_suffix(".index.npy"), "index"):
        index = dataset.index(split, shard)
    with found.file(tar, "tar"):
        file = FileEntry(bytes=entry.tar_bytes, sha256=entry.tar_sha256)
        check_size(tar, file)
        if index is not None and level != "quick":
            check_tar(tar, index, shard * dataset.record.rows_per_shard, file, level == "full")
            found.rows += entry.rows
    return found


def _cache_parts(path: Path, report: Report) -> list[_Part]:
    cache, whole, parts = Cache(path), Found(), []
    expected, projection, probe = cache.identity.teacher.projection_sha256, path / "projection.npy", path / "probe.npy"
    if expected:
        with whole.file(projection, "projection"):
            cache.projection()
    if probe.is_file():  # where it is missing, `extract` writes it
        with whole.file(probe, "probe"):
            read_sealed_npy(probe)
    report.add(whole)
    for unit in cache.all_units():
        found = Found(unit.split, str(unit))
        if unit.complete:
            with found.file(unit.manifest_file, "manifest"):
                _ = unit.manifest
        if found.problems:
            unit = _Unfinished(path, cache.identity, unit.split, unit.view)
        shards = range(unit.num_shards) if unit.complete else unit.committed()
        for file, data in unit.zarr_files().items():
            if not unit.complete and not file.exists():
                continue  # `extract` writes it
            with found.file(file, "zarr.json"):
                if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
                    raise CorruptionError(f"{file}: expected the array that cache.json asks for; missing or changed")
        report.add(found)
        parts.append(_Part(str(unit), shards, partial(_check_shard, unit, report.level)))
    return parts


class _Unfinished(Unit):
    """A unit whose manifest is damaged, as if that were missing: its shards are checked by themselves."""

    @property
    def complete(self) -> bool:
        """Never."""
        return False


def _check_shard(unit: Unit, level: str, shard: int) -> Found:
    found = Found(unit.split, str(unit), shard)
    # The features last: what they are decoded with is sound then.
    arrays = {name: unit.group / unit.specs[name].shard_file(shard) for name in sorted(unit.specs, key="patch".__eq__)}
    paths = {"index": unit.index_file(shard), "views": unit.tar(shard)} | arrays
    with found.file(unit.commit_file(shard), "commit"):
        commit = unit.commit(shard)
        names = {path.relative_to(unit.path).as_posix() for path in paths.values()}
        if commit.files.keys() != names or commit.chunk_crc32c.keys() != {"index", *unit.specs}:
            raise CorruptionError(f"{unit.commit_file(shard)}: expected {sorted(names)}; found {sorted(commit.files)}")
    if not found.problems:
        _check_files(unit, shard, commit, paths, level, found)
    return found


def _check_files(unit: Unit, shard: int, commit: Commit, paths: dict[str, Path], level: str, found: Found) -> None:
    index: npt.NDArray[np.void] | None = None
    seen = _Seen(unit.identity.channels)
    for what, path in paths.items():
        with found.file(path, what):
            entry = commit.files[path.relative_to(unit.path).as_posix()]
            check_size(path, entry)
            if level == "quick":
                continue
            if what == "index":
                index = check_view_index(path, commit, entry, level == "full")
            elif what == "views" and index is not None:
                size = (unit.identity.view_height, unit.identity.view_width)
                check_tar(path, index, shard * unit.identity.rows_per_shard, entry, level == "full", size)
                found.rows += commit.rows
            elif what != "views":
                crc32cs, spec = commit.chunk_crc32c[what], unit.specs[what]
                see = partial(seen.take, what) if level == "full" else None
                check_array(unit.group, spec, shard, crc32cs, entry, see)
            if what == "patch" and level == "full" and not found.problems:
                _check_features(unit, commit, seen)


class _Seen:
    """What passed by of a shard's arrays: the first chunk of each, and the largest error that all scales stand for."""

    def __init__(self, channels: int) -> None:
        self.channels, self.error = channels, 0.0
        self.first: dict[str, npt.NDArray[Any]] = {}

    def take(self, name: str, chunk: npt.NDArray[Any]) -> None:
        if name not in self.first:
            self.first[name] = chunk.copy()
        if name == "scale":
            self.error += step_error(chunk, self.channels)

    def finite(self) -> bool:
        """Whether the first chunk decodes to finite features; a row at a time, which stays in the processor's cache."""
        of_shard = {
            name: self.first[f"channel_{name}"][0] for name in ("mean", "std") if f"channel_{name}" in self.first
        }
        for row, codes in enumerate(self.first["patch"]):
            of_row = {name: self.first[name][row] for name in ("scale",) if name in self.first}
            if not np.isfinite(decode(codes, **of_row, **of_shard)).all():
                return False
        return True


def _check_features(unit: Unit, commit: Commit, seen: _Seen) -> None:
    """The first chunk decodes to finite features; the scales account for the error that the commit tells.

    Constant channels and steps wider than the values have less error than their scales allow, never more.
    Raises: CorruptionError.
    """
    if not seen.finite():
        raise CorruptionError(f"{unit.group}: shard {commit.shard}: its first features are not finite")
    said = commit.fidelity.relative_mse
    if not seen.error or said == 0:  # float16, or nothing lost, as where every feature is constant
        return
    mean, std = seen.first["channel_mean"][0], seen.first["channel_std"][0].astype(np.float64)
    shift = np.array(commit.channel_mean) - mean
    energy = commit.rows * unit.identity.tokens * ((np.array(commit.channel_var) + shift**2) / std**2).sum()
    tolerance = MSE_TOLERANCE + 5 / (commit.rows * unit.identity.tokens * unit.identity.channels) ** 0.5
    if not said <= seen.error / energy * (1 + tolerance):
        where, most = f"{unit.group}: shard {commit.shard}", seen.error / energy
        raise CorruptionError(f"{where}: its scales allow a relative MSE of {most:.3g}; its commit says {said:.3g}")


def step_error(scale: npt.NDArray[Any], channels: int) -> float:
    """Summed squared error of codes whose errors are uniform over a step; the largest value of a token is exact."""
    steps = scale.astype(np.float32).ravel()
    return float(np.dot(steps, steps)) / 12 * (channels - 1)
